// Reads many small variables into one array, and writes them from it: one operation instead of one for each variable.
// What TensorFlow needs for an operation, microseconds, is more than what these few bytes need. And runs a function if a
// condition holds, at next to no cost if it does not: TensorFlow's own If runs an empty function then. See build_kernel.py.

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "tensorflow/core/framework/cancellation.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/function.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace hvd_localsgd {

using namespace tensorflow;

// Each of the N tensors holds any number of handles.
REGISTER_OP("HvdLocalsgdReadVariables")
    .Input("handles: N * resource")
    .Output("flat: T")
    .Attr("N: int >= 1")
    .Attr("T: {float, double}")
    .Attr("size: int >= 0")
    .SetIsStateful()
    .SetShapeFn([](shape_inference::InferenceContext* context) {
      int64_t size;
      TF_RETURN_IF_ERROR(context->GetAttr("size", &size));
      context->set_output(0, context->Vector(size));
      return absl::OkStatus();
    });

REGISTER_OP("HvdLocalsgdWriteVariables")
    .Input("handles: N * resource")
    .Input("flat: T")
    .Attr("N: int >= 1")
    .Attr("T: {float, double}")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

REGISTER_OP("HvdLocalsgdRunIf")
    .Input("condition: bool")
    .Input("input: Tin")
    .Attr("Tin: list(type) >= 0")
    .Attr("then: func")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

template <typename From, typename To>
void Convert(const void* from, void* to, int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    const From* values = static_cast<const From*>(from);
    std::transform(values, values + count, static_cast<To*>(to), [](From value) { return static_cast<To>(value); });
  }
}

// Calls use(a value of this dtype).
template <typename Use>
absl::Status WithType(DataType dtype, Use use) {
  switch (dtype) {
    case DT_FLOAT: use(float()); break;
    case DT_DOUBLE: use(double()); break;
    case DT_HALF: use(Eigen::half()); break;
    case DT_BFLOAT16: use(bfloat16()); break;
    default: return errors::InvalidArgument("dtype ", DataTypeString(dtype));
  }
  return absl::OkStatus();
}

// Calls use(variable, where its values are in the array) for each variable behind the handles; they fill the array exactly.
template <typename T, typename Use>
absl::Status ForEachVariable(OpKernelContext* context, T* array, int64_t size, Use use) {
  OpInputList tensors;
  TF_RETURN_IF_ERROR(context->input_list("handles", &tensors));
  int64_t used = 0;
  for (const Tensor& tensor : tensors) {
    const auto handles = tensor.flat<ResourceHandle>();
    for (int64_t i = 0; i < handles.size(); ++i) {
      core::RefCountPtr<Var> variable;
      TF_RETURN_IF_ERROR(LookupResource(context, handles(i), &variable));
      mutex_lock lock(*variable->mu());
      const int64_t count = variable->tensor()->NumElements();
      if (!variable->is_initialized) return errors::FailedPrecondition(handles(i).name(), " has no value yet");
      if (used + count > size) return errors::InvalidArgument("more values than the array's ", size);
      TF_RETURN_IF_ERROR(use(variable->tensor(), array + used));
      used += count;
    }
  }
  if (used != size) return errors::InvalidArgument(used, " values, but the array has ", size);
  return absl::OkStatus();
}

template <typename T>
class ReadVariables : public OpKernel {
 public:
  explicit ReadVariables(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("size", &size_));
  }

  void Compute(OpKernelContext* context) override {
    Tensor* flat;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape({size_}), &flat));
    const auto read = [](Tensor* variable, T* to) {
      return WithType(variable->dtype(), [&](auto value) {
        Convert<decltype(value), T>(variable->data(), to, variable->NumElements());
      });
    };
    OP_REQUIRES_OK(context, ForEachVariable(context, flat->flat<T>().data(), size_, read));
  }

 private:
  int64_t size_;
};

template <typename T>
class WriteVariables : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& flat = context->input(context->num_inputs() - 1);
    const auto write = [context](Tensor* variable, const T* from) {
      if (!variable->RefCountIsOne()) {  // somebody holds the old value, which must not change under them
        Tensor fresh;
        TF_RETURN_IF_ERROR(context->allocate_temp(variable->dtype(), variable->shape(), &fresh));
        *variable = fresh;
      }
      return WithType(variable->dtype(), [&](auto value) {
        Convert<T, decltype(value)>(from, variable->data(), variable->NumElements());
      });
    };
    OP_REQUIRES_OK(context, ForEachVariable(context, flat.flat<T>().data(), flat.NumElements(), write));
  }
};

class RunIf : public AsyncOpKernel {
 public:
  explicit RunIf(OpKernelConstruction* context) : AsyncOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("then", &then_));
  }

  // Most of the time there is nothing to do: not worth another thread.
  bool IsExpensive() override { return false; }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    if (!context->input(0).scalar<bool>()()) {
      done();
      return;
    }
    FunctionLibraryRuntime* library = context->function_library();
    FunctionLibraryRuntime::Handle handle;
    OP_REQUIRES_OK_ASYNC(context, library->Instantiate(then_.name(), AttrSlice(&then_.attr()), &handle), done);
    FunctionLibraryRuntime::Options options(context->step_id());
    options.rendezvous = context->rendezvous();
    // One of its own, which the step's cancels: an error in the function would cancel the step before this operation has said
    // what it was, and an operation that is cancelled would say so first.
    auto* own = new CancellationManager(context->cancellation_manager());
    options.cancellation_manager = own;
    options.collective_executor = context->collective_executor();
    options.step_container = context->step_container();
    options.stats_collector = context->stats_collector();
    options.runner = context->runner();
    std::vector<Tensor> inputs;
    for (int i = 1; i < context->num_inputs(); ++i) inputs.push_back(context->input(i));
    auto outputs = std::make_shared<std::vector<Tensor>>();
    library->Run(options, handle, inputs, outputs.get(), [context, done, outputs, own](const absl::Status& status) {
      delete own;  // before the step's may be gone
      context->SetStatus(status);
      done();
    });
  }

 private:
  NameAttrList then_;
};

REGISTER_KERNEL_BUILDER(Name("HvdLocalsgdRunIf").Device(DEVICE_CPU), RunIf);

#define REGISTER(T)                                                                                                   \
  REGISTER_KERNEL_BUILDER(Name("HvdLocalsgdReadVariables").Device(DEVICE_CPU).TypeConstraint<T>("T"), ReadVariables<T>); \
  REGISTER_KERNEL_BUILDER(Name("HvdLocalsgdWriteVariables").Device(DEVICE_CPU).TypeConstraint<T>("T"), WriteVariables<T>)
REGISTER(float);
REGISTER(double);

}  // namespace hvd_localsgd
