#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gfast {

static Isa best() {
#if defined(GFAST_HAVE_AVX2) && defined(GFAST_HAVE_AVX512)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

static Isa choose() {
  const Isa limit = best();
  const char* wish = std::getenv("GFAST_CPU_ISA");
  if (wish == nullptr || *wish == 0) return limit;
  const std::string name = wish;
  const Isa asked = name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::baseline;
  if (asked == Isa::baseline && name != "default")
    throw std::invalid_argument("gfast: GFAST_CPU_ISA='" + name + "' is not one of default, avx2, avx512");
  if (asked > limit)
    throw std::invalid_argument("gfast: GFAST_CPU_ISA='" + name + "' is not available on this CPU or in this build");
  return asked;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  const Isa chosen = isa();
  return chosen == Isa::avx512 ? "avx512" : chosen == Isa::avx2 ? "avx2" : "default";
}

}  // namespace gfast
