// The ops' schemas.
#include "cbo.h"
#include "fused.h"

STABLE_TORCH_LIBRARY_FRAGMENT(OZ_NAMESPACE, m) {
  m.def("hold(Tensor[] tensors) -> int");
  m.def("release(int held) -> ()");
  m.def("compare_gradients(Tensor[] after, Tensor(a!)[] before, bool keep, Tensor(b!) out) -> ()");
  m.def("sample_sums(Tensor[] samples, Tensor[] means, Tensor(a!)[] sums, Tensor(b!) squares) -> ()");
  m.def("sample_dots(Tensor[] samples, Tensor[] vectors, Tensor(a!) products) -> ()");
  m.def("sample_products(Tensor[] left, Tensor[] right, Tensor(a!) products) -> ()");
  m.def("weighted_sums(Tensor[] samples, Tensor weights, Tensor(a!)[] sums) -> ()");
  m.def("dot(Tensor[] left, Tensor[] right, Tensor(a!) out) -> ()");
  m.def(optimzoo::normal_schema);
  m.def(optimzoo::cbo_schema);
}

#define OZ_RULE(Rule) \
  STABLE_TORCH_LIBRARY_FRAGMENT(OZ_NAMESPACE, m) { m.def(schema<Rule>().c_str()); }
#include "rules.h"
