// The ops as functions on tensors: differentiable, dispatched (every backend, autocast, tracing), and the same ops as
// torch.ops.lomem in Python.
#pragma once

#include <lomem/ops/activations.h>
#include <lomem/ops/dropout.h>
#include <lomem/ops/gated.h>
#include <lomem/ops/linear.h>
#include <lomem/ops/lora.h>
#include <lomem/ops/norms.h>
#include <lomem/ops/packing.h>
#include <lomem/ops/step_function.h>
#include <lomem/ops/storage.h>
