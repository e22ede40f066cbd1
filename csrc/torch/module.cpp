// The Python module: one C function per activation, straight from CPython's fast call to the typed dispatcher handle, and what
// the package asks about the build.
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/Device.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "autograd.h"
#include "cpu.h"
#include "cuda.h"
#include "monitor.h"
#include "pool.h"
#include "rows.h"

namespace py = pybind11;

namespace fastact {
namespace {

using at::Tensor;

/// Elements from which the interpreter lock is released: below, handing it over costs more than the kernel does.
constexpr int64_t kReleaseLock = 16384;

/// Runs f without the interpreter lock where the work is worth it.
template <class F>
auto unlocked(const Tensor& x, const F& f) {
  if (x.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || x.numel() < kReleaseLock) return f();
  py::gil_scoped_release release;
  return f();
}

/// A public function: its arguments' names and defaults, its plain-torch reference, and the op behind it.
struct Function {
  int row;  // of activations.h; along a dim, of softmax.h
  bool along_dim;
  std::string name, doc;
  PyMethodDef method;
  py::object reference;                // called for what has no kernel
  py::object warn;                     // along a dim: warns of an implicit or a useless one, returns the dim
  std::vector<std::string> arguments;  // x first
  std::vector<double> defaults;        // of the float parameters
  bool inplace = false;                // whether the last argument is `inplace`
  int other = kNone;                   // the row to take where the last argument, `inplace` or `precise_grad`, is true
  py::object self;                     // the C function

  static constexpr int kNone = -1;
};

/// The most arguments that a function has.
constexpr size_t kMostArguments = std::max(kMaxParameters + 2, 5);

/// Why a device that could have kernels has none; null where it has them, or never could.
const char* why_no_kernels(c10::Device device) {
  if (!device.is_cuda()) return nullptr;
#ifdef FASTACT_CUDA
  return cuda_device_has_kernels(device) ? nullptr : "fastact's CUDA kernels need a GPU of compute capability 8.0 or more";
#else
  return "fastact was built without CUDA (fastact.build_info() says why)";
#endif
}

/// Whether this build has kernels for a device. Where it could have, but has none, that is said once a process.
bool device_has_kernels(c10::Device device) {
  const char* reason = why_no_kernels(device);
  static bool warned = false;
  if (reason && !std::exchange(warned, true)) {
    const std::string text = std::string(reason) + ", so CUDA tensors get torch's own operators. (This is said once.)";
    if (PyErr_WarnEx(PyExc_UserWarning, text.c_str(), 1) < 0) throw python_error();
  }
  return !reason && (device.is_cpu() || device.is_meta() || device.is_cuda());
}

/// Whether what runs now becomes ONNX, which has no operators of ours.
bool for_onnx() {
  const bool recorded = at::tracer::impl::is_dispatch_enabled() || c10::impl::dispatch_mode_enabled();
  return recorded && py::module_::import("torch.onnx").attr("is_in_onnx_export")().cast<bool>();
}

/// Whether ops of ours may be tried on x. Torch's own subclasses that handle operators themselves know torch's alone, but for
/// those that handle any op by what was registered for it.
bool takes_ops(const Tensor& x) {
  if (!x.unsafeGetTensorImpl()->is_python_dispatch()) return true;
  const py::object self = py::reinterpret_steal<py::object>(THPVariable_Wrap(x));
  const py::handle type = self.get_type();
  const auto name = type.attr("__name__").cast<std::string>();
  return name == "FakeTensor" || name == "FunctionalTensor" || name == "DTensor" ||
         !type.attr("__module__").cast<std::string>().starts_with("torch.");
}

bool has_kernel(const Tensor& x) {
  return has_kernels(x.scalar_type()) && x.layout() == at::kStrided && !x.is_nested() && takes_ops(x) &&
         device_has_kernels(x.device()) && !for_onnx();
}

[[noreturn]] void bad_type(const Function& f, size_t position, const char* expected, PyObject* value) {
  C10_THROW_ERROR(TypeError, c10::str(f.name, "(): argument '", f.arguments[position], "' (position ", position + 1,
                                      ") must be ", expected, ", not ", Py_TYPE(value)->tp_name));
}

/// The arguments in order, null where not given. The first has the name that torch's functions give it besides its own.
void bind(const Function& f, PyObject* const* args, Py_ssize_t count, PyObject* keywords, PyObject** bound) {
  const size_t most = f.arguments.size();
  TORCH_CHECK_TYPE(size_t(count) <= most, f.name, "() takes from 1 to ", most, " positional arguments but ", count,
                   " were given");
  for (size_t k = 0; k < most; ++k) bound[k] = k < size_t(count) ? args[k] : nullptr;
  for (Py_ssize_t i = 0; keywords && i < PyTuple_GET_SIZE(keywords); ++i) {
    const char* keyword = PyUnicode_AsUTF8(PyTuple_GET_ITEM(keywords, i));
    if (!keyword) throw python_error();
    size_t k = 0;
    while (k < most && f.arguments[k] != keyword) ++k;
    if (k == most && strcmp(keyword, "input") == 0) k = 0;
    TORCH_CHECK_TYPE(k < most, f.name, "() got an unexpected keyword argument '", keyword, "'");
    TORCH_CHECK_TYPE(!bound[k], f.name, "() got multiple values for argument '", keyword, "'");
    bound[k] = args[count + i];
  }
  TORCH_CHECK_TYPE(bound[0], f.name, "() missing 1 required positional argument: '", f.arguments[0], "'");
}

/// The bound arguments after the first.
py::dict keywords_of(const Function& f, PyObject** bound) {
  py::dict keywords;
  for (size_t k = 1; k < f.arguments.size(); ++k)
    if (bound[k]) keywords[f.arguments[k].c_str()] = py::handle(bound[k]);
  return keywords;
}

PyObject* call_reference(const Function& f, PyObject** bound) {
  return f.reference(py::handle(bound[0]), **keywords_of(f, bound)).release().ptr();
}

/// Whether a tensor subclass or a mode wants to see the call before us.
bool has_torch_function(PyObject* x) {
  if (at::impl::torch_function_mode_enabled()) return true;
  if (THPVariable_CheckExact(x) || PyType_Check(x)) return false;
  return py::module_::import("torch.overrides").attr("has_torch_function_unary")(py::handle(x)).cast<bool>();
}

PyObject* call_torch_function(const Function& f, PyObject** bound) {
  const py::object handler = py::module_::import("torch.overrides").attr("handle_torch_function");
  const py::object x = py::reinterpret_borrow<py::object>(bound[0]);
  return handler(f.self, py::make_tuple(x), x, **keywords_of(f, bound)).release().ptr();
}

/// A Python number as a parameter of the kernel for x; empty where torch has to say what becomes of it: of tensors, complex
/// numbers, and what does not fit.
std::optional<double> parameter(PyObject* value, const Tensor& x) {
  if (!PyFloat_Check(value) && !PyLong_Check(value)) return {};
  if (PyLong_Check(value)) {
    int overflow = 0;
    PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow) return {};
  }
  const double number = PyFloat_AsDouble(value);
  const bool fits =
      x.scalar_type() == at::kDouble || !std::isfinite(number) || std::abs(number) <= std::numeric_limits<float>::max();
  return fits ? std::optional<double>(number) : std::nullopt;
}

PyObject* call_row(const Function& f, PyObject** bound, const Tensor& x) {
  double parameters[kMaxParameters] = {};
  const size_t arity = f.defaults.size();
  for (size_t k = 0; k < arity; ++k) {
    PyObject* value = bound[k + 1];
    parameters[k] = f.defaults[k];
    if (!value) continue;
    if (!PyNumber_Check(value)) bad_type(f, k + 1, "Number", value);
    const std::optional<double> number = parameter(value, x);
    if (!number) return call_reference(f, bound);
    parameters[k] = *number;
  }
  bool flag = false;
  if (PyObject* last = bound[arity + 1]) {
    const int truth = PyObject_IsTrue(last);
    if (truth < 0) throw python_error();
    flag = truth;
  }
  if (!has_kernel(x)) return call_reference(f, bound);
  const bool inplace = f.inplace && flag;
  const int row = flag ? f.other : f.row;
  if (!inplace && plain(x) && untracked(x))
    return THPVariable_Wrap(unlocked(x, [&] { return cpu_forward(row, x, parameters); }));
  return with_arity(int(arity), [&]<class... P>() -> PyObject* {
    return spread<P...>(parameters, [&](P... p) -> PyObject* {
      if (inplace) {
        unlocked(x, [&] { inplace_op<P...>(row).call(x, p...); });
        return Py_NewRef(bound[0]);
      }
      return THPVariable_Wrap(unlocked(x, [&] { return forward_op<P...>(row).call(x, p...); }));
    });
  });
}

/// What the arguments from `at` on say, temperature and masked_rows; empty where the reference has to look at them.
std::optional<SoftmaxOptions> softmax_options(const Function& f, PyObject** bound, size_t at, const Tensor& x) {
  SoftmaxOptions options;
  if (PyObject* temperature = bound[at]) {
    if (!PyNumber_Check(temperature)) bad_type(f, at, "Number", temperature);
    const std::optional<double> number = parameter(temperature, x);
    if (!number || !is_temperature(*number)) return {};
    options.temperature = *number;
  }
  if (PyObject* masked_rows = bound[at + 1]) {
    if (!PyUnicode_Check(masked_rows)) return {};
    options.masked_zero = PyUnicode_CompareWithASCIIString(masked_rows, "zero") == 0;
    if (!options.masked_zero && PyUnicode_CompareWithASCIIString(masked_rows, "nan") != 0) return {};
  }
  return options;
}

PyObject* call_softmax(const Function& f, PyObject** bound, const Tensor& given) {
  PyObject* dim_ = bound[1] && bound[1] != Py_None ? bound[1] : nullptr;
  PyObject* dtype = bound[2] && bound[2] != Py_None ? bound[2] : nullptr;
  if (dtype && !THPDtype_Check(dtype)) {
    if (PyType_Check(dtype)) return call_reference(f, bound);  // Python's float, as torch takes it
    bad_type(f, 2, "torch.dtype", dtype);
  }
  const bool unusual = dim_ && !PyLong_CheckExact(dim_);  // asking whether an object is a tensor takes long
  if (unusual && (PyBool_Check(dim_) || !PyIndex_Check(dim_))) bad_type(f, 1, "int", dim_);
  const Tensor x = dtype ? given.to(reinterpret_cast<THPDtype*>(dtype)->scalar_type) : given;
  const auto options = kSoftmaxes[f.row].tempered ? softmax_options(f, bound, 3, x) : SoftmaxOptions();
  if (!options || !has_kernel(x) || (unusual && THPVariable_Check(dim_))) return call_reference(f, bound);

  int64_t dim;
  if (dim_) {
    const py::object index = py::reinterpret_steal<py::object>(unusual ? PyNumber_Index(dim_) : Py_NewRef(dim_));
    if (!index) throw python_error();
    int overflow = 0;
    dim = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow) return call_reference(f, bound);
  } else {
    dim = f.warn(py::none(), x.dim()).cast<int64_t>();
  }
  static bool warned = false;
  const int64_t rank = x.dim();
  if (!warned && rank > 0 && -rank <= dim && dim < rank && !x.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
      x.size(dim) == 1) {
    warned = true;
    f.warn(dim, rank);
  }
  std::optional<c10::impl::ExcludeDispatchKeyGuard> as_asked;  // autocast leaves the dtype that a call names
  if (dtype) as_asked.emplace(c10::autocast_dispatch_keyset);
  return THPVariable_Wrap(unlocked(x, [&] {
    return plain(x) && untracked(x) ? cpu_softmax(f.row, x, dim, *options) : call_softmax_op(f.row, x, dim, *options);
  }));
}

/// Whether the error that is set says that a tensor's class has no operator of that name; it is then no longer set.
bool refused() {
  py::error_already_set error;
  const bool is = error.matches(PyExc_NotImplementedError) ||
                  (error.matches(PyExc_TypeError) && strstr(error.what(), "__torch_dispatch__ handlers returned"));
  if (!is) error.restore();
  return is;
}

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  HANDLE_TH_ERRORS
  const Function& f = **static_cast<Function**>(PyModule_GetState(self));
  PyObject* bound[kMostArguments] = {};
  if (count == 1 && !keywords)
    bound[0] = args[0];
  else
    bind(f, args, count, keywords, bound);
  if (has_torch_function(bound[0])) return call_torch_function(f, bound);
  if (!THPVariable_Check(bound[0])) bad_type(f, 0, "Tensor", bound[0]);
  const Tensor& x = THPVariable_Unpack(bound[0]);
  try {
    return f.along_dim ? call_softmax(f, bound, x) : call_row(f, bound, x);
  } catch (python_error& error) {
    error.restore();
    if (!x.unsafeGetTensorImpl()->is_python_dispatch() || !refused()) return nullptr;
    return call_reference(f, bound);
  }
  END_HANDLE_TH_ERRORS
}

struct Direct {
  c10::OperatorHandle op;
  bool autocast;  // whether torch casts the arguments of the op's twin to the lower precision of an autocast region
};

/// Calls an op of tensors and ints without torch's parser of arguments, and returns its first result: where all tensors are
/// exactly torch's, of one dtype and device that has kernels, outside modes. Else nothing has happened, and it returns None.
PyObject* call_direct(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto& [op, autocast] = *static_cast<Direct*>(PyCapsule_GetPointer(self, nullptr));
  const auto& arguments = op.schema().arguments();
  if (size_t(count) != arguments.size() || at::impl::torch_function_mode_enabled()) Py_RETURN_NONE;
  torch::jit::Stack stack;
  stack.reserve(size_t(count));
  const Tensor* first = nullptr;
  std::optional<at::ScalarType> lower;
  for (size_t k = 0; k < size_t(count); ++k) {
    if (arguments[k].type()->kind() == c10::TypeKind::TensorType) {
      if (!THPVariable_CheckExact(args[k])) Py_RETURN_NONE;
      const Tensor& given = THPVariable_Unpack(args[k]);
      if (!first) {
        // Of other devices autocast may not even be asked.
        if (!given.is_cpu() && !given.is_cuda()) Py_RETURN_NONE;
        first = &given;
        const auto device = given.device().type();
        if (autocast && at::autocast::is_autocast_enabled(device)) lower = at::autocast::get_autocast_dtype(device);
      }
      stack.emplace_back(lower ? at::autocast::cached_cast(*lower, given, first->device().type()) : given);
      const Tensor &t = stack.back().toTensor(), &x = stack[0].toTensor();
      if (!has_kernel(t) || t.scalar_type() != x.scalar_type() || t.device() != x.device()) Py_RETURN_NONE;
    } else {
      if (!PyLong_CheckExact(args[k])) Py_RETURN_NONE;
      int overflow = 0;
      stack.emplace_back(int64_t(PyLong_AsLongLongAndOverflow(args[k], &overflow)));
      if (overflow) Py_RETURN_NONE;
    }
  }
  if (!first) Py_RETURN_NONE;
  unlocked(*first, [&] { op.callBoxed(&stack); });
  return THPVariable_Wrap(stack[0].toTensor());
  END_HANDLE_TH_ERRORS
}

py::object make_direct(const std::string& name, bool autocast) {
  static PyMethodDef method = {"direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_direct)),
                               METH_FASTCALL, nullptr};
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("fastact::" + name).c_str(), "");
  const py::capsule self(new Direct{op, autocast}, [](void* p) { delete static_cast<Direct*>(p); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, self.ptr()));
}

/// Of activations.h.
int known_row(const std::string& name) {
  const int row = row_named(name);
  return row >= 0 ? row : throw py::key_error("no activation named " + name);
}

/// The arguments that a function must have: x, then those that its caller below looks at.
std::vector<std::string> expected_arguments(const Function& f) {
  std::vector<std::string> names{"x"};
  if (f.along_dim) {
    names.insert(names.end(), {"dim", "dtype"});
    if (kSoftmaxes[f.row].tempered) names.insert(names.end(), {"temperature", "masked_rows"});
  } else {
    for (int k = 0; k < kRows[f.row].arity(); ++k) names.push_back(kRows[f.row].parameters[k]);
    if (f.inplace) names.push_back("inplace");
    if (!f.inplace && f.other != Function::kNone) names.push_back("precise_grad");
  }
  return names;
}

/// Makes the C function for a public name. It lives as long as the process, as the functions of any module do.
py::object make_function(const std::string& name, py::object reference, std::vector<std::string> arguments,
                         std::vector<double> defaults, bool inplace, const std::string& doc, py::object warn) {
  const int softmax = softmax_named(name);
  const bool along_dim = softmax >= 0;
  auto* f = new Function{along_dim ? softmax : known_row(name),
                         along_dim,
                         name,
                         doc,
                         {},
                         std::move(reference),
                         std::move(warn),
                         std::move(arguments),
                         std::move(defaults),
                         inplace};
  if (inplace) {
    const int result = row_named("result_" + name);
    f->other = result >= 0 ? result : f->row;
  }
  if (!f->arguments.empty() && f->arguments.back() == "precise_grad") f->other = row_named("precise_" + name);
  if (f->arguments != expected_arguments(*f) || (!along_dim && int(f->defaults.size()) != kRows[f->row].arity()))
    throw py::value_error(name + ": the Python signature differs from the row's parameters");
  f->method = {f->name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
               METH_FASTCALL | METH_KEYWORDS, f->doc.c_str()};
  // Bound to a module object that holds the pointer: so it prints, pickles and copies as any built-in function of a module.
  static PyModuleDef owner = {
      PyModuleDef_HEAD_INIT, "fastact.functional", nullptr, sizeof(Function*), nullptr, nullptr, nullptr, nullptr, nullptr};
  const py::object self = py::reinterpret_steal<py::object>(PyModule_Create(&owner));
  *static_cast<Function**>(PyModule_GetState(self.ptr())) = f;
  f->self = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&f->method, self.ptr(), py::str("fastact.functional").ptr()));
  return f->self;
}

py::list rows() {
  py::list list;
  for (const Row& row : kRows) {
    py::list parameters;
    for (int k = 0; k < row.arity(); ++k) parameters.append(row.parameters[k]);
    list.append(py::make_tuple(row.name, row.functor, py::tuple(parameters)));
  }
  return list;
}

py::list rows_along_dim() {
  py::list list;
  for (const SoftmaxRow& row : kSoftmaxes) list.append(py::make_tuple(row.name, row.functor));
  return list;
}

bool saves_input(const std::string& name, std::vector<double> parameters) {
  const int row = known_row(name);
  if (int(parameters.size()) != kRows[row].arity()) throw py::value_error("wrong number of parameters for " + name);
  parameters.resize(kMaxParameters);
  return kRows[row].saves_input(parameters.data());
}

py::dict build_info() {
  py::list levels;
  for (int level = 0; level < cpu::kLevelCount; ++level) levels.append(cpu::kLevels[level]);
  py::dict info;
  info["isa_levels"] = levels;
  info["isa"] = cpu::kernels().isa;
  info["threads"] = at::get_num_threads();
  return info;
}

py::dict pool_stats() {
  const pool::Stats s = pool::stats();
  py::dict d;
  d["limit"] = s.limit;
  d["held"] = s.held;
  d["blocks"] = s.blocks;
  d["in_use"] = s.in_use;
  d["hits"] = s.hits;
  d["misses"] = s.misses;
  return d;
}

/// How many threads at::parallel_for really runs on in this library, given time to start.
size_t parallel_threads() {
  std::set<std::thread::id> seen;
  std::mutex mutex;
  at::parallel_for(0, 64, 1, [&](int64_t, int64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    const std::lock_guard<std::mutex> lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return seen.size();
}

}  // namespace
}  // namespace fastact

PYBIND11_MODULE(_C, m) {
  using namespace fastact;
  m.doc() = "The compiled half of fastact.";
  m.def("make_function", &make_function);
  m.def("make_direct", &make_direct, py::arg("name"), py::arg("autocast") = false,
        "A quick way to call an op of tensors and ints; it returns None where it is not for them.");
  m.def("rows", &rows, "(name, functor, parameter names) of every elementwise activation.");
  m.def("rows_along_dim", &rows_along_dim, "(name, functor) of every activation along a dim: softmax and its relatives.");
  m.def("saves_input", &saves_input, "Whether backward wants the input rather than the output.");
  m.attr("MOST_PIECES") = kMostPieces;
  m.attr("TEMPERATURE_EXPONENT") = kTemperatureExponent;
  m.def("build_info", &build_info, "What is in use: instruction sets and threads.");
  m.def(
      "device_has_kernels", [](const std::string& device) { return device_has_kernels(c10::Device(device)); },
      "Whether calls with tensors of that device reach a kernel; warns, once, where only the build is missing.");
  m.def("use_isa", &cpu::use_level, "For tests: takes the kernels of that level; False where this CPU has it not.");
  m.def("pool_stats", &pool_stats);
  m.def("pool_start", &pool::start);
  m.def("pool_limit", &pool::set_limit, py::call_guard<py::gil_scoped_release>());
  m.def("pool_empty_cache", &pool::empty_cache, py::call_guard<py::gil_scoped_release>());
  define_monitor(m);
  m.def("parallel_threads", &parallel_threads, py::call_guard<py::gil_scoped_release>());
}
