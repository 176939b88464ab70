// Everything.
#pragma once

#include <lomem/activations.h>
#include <lomem/core.h>
#include <lomem/kernels.h>
#include <lomem/nn.h>
#include <lomem/ops.h>
#include <lomem/step_function.h>
