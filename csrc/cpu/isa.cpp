#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gfast {

static Isa best() {
#if defined(GFAST_HAVE_AVX2) && defined(GFAST_HAVE_AVX512)
  __builtin_cpu_init();  // this runs among the static objects
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

namespace {

// What was chosen, or what is wrong with the wish.
struct Choice {
  Isa isa;
  std::string error;
};

Choice choose() {
  const Isa limit = best();
  const char* wish = std::getenv("GFAST_CPU_ISA");
  if (wish == nullptr || *wish == 0) return {limit, ""};
  const std::string name = wish;
  const Isa asked = name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::baseline;
  if (asked == Isa::baseline && name != "default")
    return {limit, "gfast: GFAST_CPU_ISA='" + name + "' is not one of default, avx2, avx512"};
  if (asked > limit)
    return {limit, "gfast: GFAST_CPU_ISA='" + name + "' is not available on this CPU or in this build"};
  return {asked, ""};
}

// As the library is loaded: a child forked while another thread chooses would wait for that thread for ever. A wish that
// is wrong is an error of the call, which loading the library could not raise.
const Choice chosen = choose();

}  // namespace

Isa isa() {
  if (!chosen.error.empty()) throw std::invalid_argument(chosen.error);
  return chosen.isa;
}

const char* isa_name() {
  const Isa used = isa();
  return used == Isa::avx512 ? "avx512" : used == Isa::avx2 ? "avx2" : "default";
}

}  // namespace gfast
