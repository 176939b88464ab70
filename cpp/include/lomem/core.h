// The torch-free core: packing, step functions, codes drawn at random, norm formulas, fast
// activations, gated units, dropout, storage in groups. Headers only.
#pragma once

#include <lomem/config.h>
#include <lomem/core/activation.h>
#include <lomem/core/drawn.h>
#include <lomem/core/dropout.h>
#include <lomem/core/dtype.h>
#include <lomem/core/fast_forward.h>
#include <lomem/core/gated.h>
#include <lomem/core/mersenne.h>
#include <lomem/core/norm.h>
#include <lomem/core/packing.h>
#include <lomem/core/philox.h>
#include <lomem/core/rounding.h>
#include <lomem/core/step.h>
#include <lomem/core/storage.h>
#include <lomem/version.h>
