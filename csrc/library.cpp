// The ops' schemas.
#include "fused.h"

STABLE_TORCH_LIBRARY_FRAGMENT(OZ_NAMESPACE, m) {
  m.def("hold(Tensor[] tensors) -> int");
  m.def("release(int held) -> ()");
  m.def("dot(Tensor[] left, Tensor[] right, Tensor(a!) out) -> ()");
}

#define OZ_RULE(Rule) \
  STABLE_TORCH_LIBRARY_FRAGMENT(OZ_NAMESPACE, m) { m.def(schema<Rule>().c_str()); }
#include "rules.h"
