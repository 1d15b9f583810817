"""C++ of the functions that gates are made of, as a few operations on vectors without a call.

A call of the vector library for each of them takes as long as the products of a small layer, and around it
all registers are written to memory. In float32 both are right to 1.5 units in the last place; other types and
processors take the library's.
"""

from __future__ import annotations

GATES = """
template <typename V> static inline V sigmoid(const V& x) { return V(1) / (V(1) + x.neg().exp()); }
template <typename V> static inline V hyperbolic_tangent(const V& x) { return x.tanh(); }

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
using Single = at::vec::Vectorized<float>;

// exp(x) = power * (1 + result), where power is a power of two and the result exp(r) - 1, |r| <= log(2) / 2.
static inline Single exponential(const Single& x, Single& power) {
    using Int = at::vec::Vectorized<int32_t>;
    const Single n = (x * Single(1.44269504f)).round();
    // log(2) in two parts, the first of which has few digits, so that its multiples are exact.
    Single r = at::vec::fmadd(n, Single(-0.693359375f), x);
    r = at::vec::fmadd(n, Single(2.12194440e-4f), r);
    Single sum = at::vec::fmadd(r, Single(1.f / 5040), Single(1.f / 720));
    sum = at::vec::fmadd(sum, r, Single(1.f / 120));
    sum = at::vec::fmadd(sum, r, Single(1.f / 24));
    sum = at::vec::fmadd(sum, r, Single(1.f / 6));
    sum = at::vec::fmadd(sum, r, Single(.5f));
    power = at::vec::cast<float>((at::vec::convert_to_int_of_same_size(n) + Int(127)) << Int(23));
    return at::vec::fmadd(sum * r, r, r);
}

// Beyond the bounds the results are 0 and 1 to all digits, or as close as normal numbers can be.
static inline Single sigmoid(const Single& x) {
    Single power;
    const Single more = exponential(at::vec::clamp(x.neg(), Single(-87.f), Single(87.f)), power);
    return Single(1) / at::vec::fmadd(power, more, power + Single(1));
}

static inline Single hyperbolic_tangent(const Single& x) {
    Single power;
    const Single more = exponential(at::vec::clamp(x + x, Single(-20.f), Single(20.f)), power);
    const Single less_one = at::vec::fmadd(power, more, power - Single(1));
    return less_one / (less_one + Single(2));
}
#endif
"""
