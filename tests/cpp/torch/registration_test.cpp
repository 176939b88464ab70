// What the dispatcher has of every op in the list (cpp/src/ops.def), and the calls that follow from it.
#include <ATen/ATen.h>
#include <ATen/core/op_registration/infer_schema.h>
#include <ATen/core/stack.h>
#include <gtest/gtest.h>

#include "../../../cpp/src/op.h"
#include "../op_list.h"

namespace {

using c10::DispatchKey;
using lomem::detail::OptionalDoubles;
using lomem::detail::OptionalDtype;
using lomem::detail::OptionalTensor;
using op_list::Entry;

TEST(Registration, HasTheOpsOfTheListAndNoOthers) {
  EXPECT_EQ(op_list::registered(), op_list::names());
  EXPECT_EQ(op_list::names().size(), std::size(op_list::entries));
}

TEST(Registration, GivesEveryOpTheTagsOfItsTraits) {
  for (const Entry& op : op_list::entries) {
    std::set<at::Tag> expected = {at::Tag::pt2_compliant_tag};
    if (op.has(op_list::strided)) {
      expected.insert(at::Tag::needs_exact_strides);
    }
    if (op.has(op_list::random)) {
      expected.insert(at::Tag::nondeterministic_seeded);
    }
    const auto handle = op.handle();
    const auto tags = handle.getTags();
    EXPECT_EQ(std::set<at::Tag>(tags.begin(), tags.end()), expected) << op.name;
  }
}

TEST(Registration, HasKernelsWhereTheTraitsSaySo) {
  for (const Entry& op : op_list::entries) {
    SCOPED_TRACE(op.name);
    const auto handle = op.handle();
    const bool composite = handle.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
    if (op.has(op_list::kernels)) {
      EXPECT_TRUE(handle.hasKernelForDispatchKey(DispatchKey::Meta));
      // (One that is composed of others needs none, but may have a quicker one.)
      EXPECT_TRUE(handle.hasKernelForDispatchKey(DispatchKey::CPU) || op.has(op_list::composite));
      EXPECT_FALSE(composite);
    }
    // For other devices: what it is made of, or what it says there.
    EXPECT_NE(handle.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd), composite);
    for (const DispatchKey key : {DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::Meta}) {
      EXPECT_TRUE(handle.hasComputedKernelForDispatchKey(key)) << c10::toString(key);
    }
  }
}

TEST(Registration, RaisesForGradientsOfWhatIsNotDifferentiable) {
  for (const Entry& op : op_list::entries) {
    if (op.has(op_list::not_differentiable)) {
      EXPECT_TRUE(op.handle().hasKernelForDispatchKey(DispatchKey::Autograd)) << op.name;
    }
  }
}

TEST(Registration, LetsAutocastPassWhatKeepsItsDtype) {
  for (const Entry& op : op_list::entries) {
    if (op.has(op_list::keeps_dtype)) {
      const auto handle = op.handle();
      for (const DispatchKey key : {DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA}) {
        ASSERT_TRUE(handle.hasKernelForDispatchKey(key)) << op.name << ", " << c10::toString(key);
        EXPECT_TRUE(handle.isKernelFallthroughKernel(key)) << op.name << ", " << c10::toString(key);
      }
    }
  }
}

/// The message of the error of op(tensor, ...), of which the refusal reads no argument but the tensors.
std::string refusal_of(const c10::OperatorHandle& op, const at::Tensor& tensor) {
  torch::jit::Stack stack;
  for (const auto& argument : op.schema().arguments()) {
    const bool is_tensor = argument.type()->kind() == c10::TypeKind::TensorType;
    stack.push_back(is_tensor ? c10::IValue(tensor) : c10::IValue());
  }
  try {
    op.callBoxed(stack);
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(Registration, RefusesNestedTensorsInOneSentence) {
  const auto nested = at::_nested_tensor_from_tensor_list({at::ones({2}), at::ones({3})});
  for (const auto& tensor : {nested, nested.clone().requires_grad_()}) {
    for (const Entry& op : op_list::entries) {
      const auto handle = op.handle();
      for (const DispatchKey key :
           {DispatchKey::NestedTensorCPU, DispatchKey::NestedTensorCUDA, DispatchKey::AutogradNestedTensor}) {
        EXPECT_TRUE(handle.hasKernelForDispatchKey(key)) << op.name << ", " << c10::toString(key);
      }
      const std::string first = handle.schema().arguments()[0].name();
      EXPECT_EQ(refusal_of(handle, tensor), op.name + ": " + first + " is a nested tensor, expected a dense one");
    }
  }
}

TEST(Registration, RefusesOtherLayoutsInOneSentenceWhereItHasKernels) {
  const auto sparse = at::ones({2, 3}).to_sparse();
  for (const Entry& op : op_list::entries) {
    if (op.has(op_list::kernels) && !op.has(op_list::composite)) {
      const auto handle = op.handle();
      const std::string first = handle.schema().arguments()[0].name();
      // (Past autograd, which for some has code of its own.)
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      EXPECT_EQ(
          refusal_of(handle, sparse),
          op.name + ": " + first + " has layout Sparse, expected a dense (torch.strided) tensor");
    }
  }
}

/// What differs between an op's schema and what torch infers from the C++ signature of its call.
template <class Signature>
std::string schema_differences(const char* name) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  handle.typed<Signature>();  // raises where kernels have another signature
  // (As the dispatcher compares them with those of kernels.)
  const auto differences = c10::findSchemaDifferences(
      c10::inferFunctionSchemaFlattenedReturns<Signature>().cloneWithRealTypes(), handle.schema().cloneWithRealTypes());
  return differences.value_or("");
}

TEST(Calls, HaveTheSignaturesOfTheirSchemas) {
#define LOMEM_OP(op, traits, schema, ...)                   \
  EXPECT_STREQ(lomem::detail::ops::op.name, "lomem::" #op); \
  EXPECT_NO_THROW({ EXPECT_EQ((schema_differences<__VA_ARGS__>("lomem::" #op)), "") << (#op); });
#include "../../../cpp/src/ops.def"
#undef LOMEM_OP
}

}  // namespace
