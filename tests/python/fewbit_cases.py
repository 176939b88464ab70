"""FewBit's names, for the tests of lomem.compat.fewbit."""

#: Functions with a derivative of many values, and their parameters with torch's defaults.
CONTINUOUS = {
    "celu": {"alpha": 1.0},
    "elu": {"alpha": 1.0},
    "gelu": {},
    "hardswish": {},
    "logsigmoid": {},
    "mish": {},
    "selu": {},
    "sigmoid": {},
    "silu": {},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "softsign": {},
    "tanh": {},
    "tanhshrink": {},
}

#: Functions with a derivative of two values.
PIECEWISE = ["hardshrink", "hardsigmoid", "hardtanh", "leaky_relu", "relu", "relu6", "softshrink", "threshold"]

ACTIVATIONS = [*CONTINUOUS, *PIECEWISE]

#: The module of each.
MODULES = {
    **{name: name.capitalize() for name in ACTIVATIONS},
    **{name: name.upper() for name in ("celu", "elu", "gelu", "selu")},
    "leaky_relu": "LeakyReLU",
    "logsigmoid": "LogSigmoid",
    "relu": "ReLU",
    "relu6": "ReLU6",
    "silu": "SiLU",
}

#: ``fewbit.*``, without modules.
TOP_LEVEL = {
    *MODULES.values(),
    "LinearCRS",
    "LinearGRP",
    "RandomizedLinear",
    "Stepwise",
    "VarianceEstimator",
    "convert_linear",
    "map_module",
}

#: ``fewbit.functional.*``, without modules.
FUNCTIONS = {
    *ACTIVATIONS,
    "GradientStorage",
    "StepwiseStore",
    "catch_gradients",
    "linear_crs",
    "linear_grp",
    "linear_randomized",
    "stepwise",
    "store",
}
