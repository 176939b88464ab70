// lomem._C: information about the build and the machine, and fast calls of the activations. Loading it loads the
// library, which registers the ops.
#include <lomem/cpu/kernels.h>
#include <lomem/ops.h>
#include <lomem/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

std::vector<std::string> cuda_archs() {
  std::vector<std::string> result;
  std::istringstream list(LOMEM_CUDA_ARCHS);
  for (std::string arch; list >> arch;) {
    result.push_back(arch);
  }
  return result;
}

std::pair<std::vector<double>, std::vector<double>> step_function(
    const std::string& function, int64_t bits, const std::string& criterion, const std::vector<double>& parameters) {
  HANDLE_TH_ERRORS
  lomem::StepFunction steps = lomem::step_function(function, bits, criterion, parameters);
  return {std::move(steps.boundaries), std::move(steps.levels)};
  END_HANDLE_TH_ERRORS_PYBIND
}

std::pair<double, double> drawn_levels(
    const std::string& function, int64_t bits, const std::vector<double>& parameters) {
  HANDLE_TH_ERRORS
  const lomem::DrawnLevels<double> levels = lomem::drawn_levels(function, bits, parameters);
  return {levels.low, levels.step};
  END_HANDLE_TH_ERRORS_PYBIND
}

/// The table of activations, for tests and documentation: name, parameters with their defaults, whether the gradient is
/// exact, and whether there is a published step function.
pybind11::list activations() {
  pybind11::list rows;
  for (const lomem::detail::ActivationFacts& row : lomem::detail::activation_facts()) {
    pybind11::list parameters;
    for (const auto& [name, value] : row.parameters) {
      parameters.append(pybind11::make_tuple(name, value ? pybind11::cast(*value) : pybind11::none()));
    }
    rows.append(pybind11::make_tuple(row.name, pybind11::tuple(parameters), row.is_exact, row.is_published));
  }
  return rows;
}

// Calls of the activations' C++ functions. They do the same as torch.ops.lomem, where resolving argument types at run
// time costs as much as a small activation. These take positional arguments in a fixed order, and return NotImplemented
// if one has another type: torch.ops gives the best error message for that.

// Each `read` reads an argument and returns false if the object has another type.

/// The result is valid as long as the object.
bool read(PyObject* object, std::string_view& text) {
  if (!PyUnicode_Check(object)) {
    return false;
  }
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(object, &size);
  if (data == nullptr) {
    PyErr_Clear();
    return false;
  }
  text = std::string_view(data, static_cast<size_t>(size));
  return true;
}

/// A tuple of numbers.
bool read(PyObject* tuple, std::vector<double>& values) {
  if (!PyTuple_Check(tuple)) {
    return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    PyObject* const item = PyTuple_GET_ITEM(tuple, i);
    if (PyFloat_Check(item)) {
      values.push_back(PyFloat_AS_DOUBLE(item));
    } else if (PyLong_Check(item)) {
      const double value = PyLong_AsDouble(item);
      if (value == -1.0 && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        return false;
      }
      values.push_back(value);
    } else {
      return false;
    }
  }
  return true;
}

bool read(PyObject* object, int64_t& number) {
  if (!PyLong_CheckExact(object)) {
    return false;
  }
  int overflows = 0;
  number = PyLong_AsLongLongAndOverflow(object, &overflows);
  return overflows == 0;
}

bool read(PyObject* object, bool& flag) {
  flag = object == Py_True;
  return PyBool_Check(object);
}

/// What an argument is read into.
template <class Argument>
using Held = std::conditional_t<std::is_same_v<Argument, at::ArrayRef<double>>, std::vector<double>, Argument>;

template <auto function>
struct FastCall;

template <class... Arguments, at::Tensor (*function)(const at::Tensor&, Arguments...)>
struct FastCall<function> {
  static PyObject* call(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    std::tuple<Held<Arguments>...> values;
    const bool readable = std::apply(
        [&](auto&... value) {
          const auto* next = args + 1;
          return count == 1 + Py_ssize_t{sizeof...(value)} && THPVariable_Check(args[0]) &&
                 (read(*next++, value) && ...);
        },
        values);
    if (!readable) {
      return Py_NewRef(Py_NotImplemented);
    }
    // A copy, because another thread may replace the tensor in the object while the GIL is released.
    const at::Tensor input = THPVariable_Unpack(args[0]);
    at::Tensor result;
    {
      const pybind11::gil_scoped_release others_run;
      result = std::apply([&](const auto&... value) { return function(input, value...); }, values);
    }
    return THPVariable_Wrap(std::move(result));
    END_HANDLE_TH_ERRORS
  }
};

template <auto function>
PyMethodDef fast_method(const char* name, const char* doc) {
  return {
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&FastCall<function>::call)), METH_FASTCALL, doc};
}

/// The overload without a step function.
using FewBitActivation =
    at::Tensor(const at::Tensor&, std::string_view, at::ArrayRef<double>, int64_t, std::string_view, bool);
constexpr FewBitActivation* few_bit_activation = &lomem::detail::few_bit_activation;

PyMethodDef fast_methods[] = {
    fast_method<few_bit_activation>(
        "few_bit_activation",
        "few_bit_activation($module, input, function, parameters, bits, criterion, fast, /)\n--\n\n"
        "Calls an activation of the table, bypassing __torch_function__; returns NotImplemented for arguments of other "
        "types."),
    fast_method<&lomem::detail::exact_activation>(
        "exact_activation",
        "exact_activation($module, input, function, parameters, /)\n--\n\n"
        "Calls an activation with an exact gradient, bypassing __torch_function__; returns NotImplemented for "
        "arguments of other types."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and run-time information of lomem, and calls of its activations.";
  m.attr("version") = LOMEM_VERSION;
  m.attr("torch_version") = LOMEM_TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.def("cpu_capability", &lomem::cpu::capability, "Instruction set that lomem's CPU kernels use.");
  m.def(
      "cuda_archs", &cuda_archs,
      "CUDA architectures that kernels were compiled for, in the notation of TORCH_CUDA_ARCH_LIST; none in a build "
      "without CUDA.");
  m.def(
      "step_function", &step_function,
      "Boundaries and levels of the library's step function for an activation of the table.");
  m.def(
      "drawn_levels", &drawn_levels,
      "Lowest level, and distance of levels, among which an activation of the table draws its derivative.");
  m.def(
      "activations", &activations,
      "The table of activations: (name, ((parameter, default or None), ...), is_exact, is_published).");
  if (PyModule_AddFunctions(m.ptr(), fast_methods) != 0) {
    throw pybind11::error_already_set();
  }
  m.def("manual_seed", &lomem::manual_seed, "Restarts lomem's stream of seeds.");
  m.def("random_state", &lomem::random_state, "Start of the stream of seeds and number of seeds drawn since.");
  m.def("set_random_state", &lomem::set_random_state, "Resumes from a state that random_state returned.");
  m.def("draw_seed", &lomem::draw_seed, "The next seed of the stream, on the device of a tensor.");
  m.def(
      "begin_random_stream", &lomem::detail::begin_random_stream,
      "Starts the stream of seeds at the position of torch's default CPU generator.");
}
