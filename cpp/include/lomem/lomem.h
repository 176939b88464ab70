// Includes all of lomem.
#pragma once

#include <lomem/core.h>
#include <lomem/cpu/kernels.h>
#include <lomem/nn.h>
#include <lomem/ops.h>
