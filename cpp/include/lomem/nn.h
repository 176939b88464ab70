// The torch::nn modules.
#pragma once

#include <lomem/nn/activations.h>
#include <lomem/nn/dropout.h>
#include <lomem/nn/gated.h>
#include <lomem/nn/linear.h>
#include <lomem/nn/lora.h>
#include <lomem/nn/norms.h>
