// Compiled without contraction and with -frounding-math: the rounding is the one that PTX names.
#include "numbers.h"

#include <algorithm>
#include <cfenv>

namespace emulator {

std::uint16_t to_float16(float x) {
  if (std::isnan(x)) {
    return 0x7fff;
  }
  const auto sign = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16 & 0x8000U);
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude == 0) {
    return sign;
  }
  if (std::isinf(x)) {
    return sign | 0x7c00U;
  }
  const int exponent = std::max(std::ilogb(magnitude), -14);
  const double spacing = std::ldexp(1.0, exponent - 10);
  const double rounded = std::nearbyint(magnitude / spacing) * spacing;  // The quotient is exact; ties go to even.
  if (rounded >= 65536.0) {
    return sign | 0x7c00U;
  }
  if (rounded < std::ldexp(1.0, -14)) {
    return sign | static_cast<std::uint16_t>(rounded / std::ldexp(1.0, -24));
  }
  const int rounded_exponent = std::ilogb(rounded);
  const auto mantissa = static_cast<unsigned>((rounded / std::ldexp(1.0, rounded_exponent) - 1) * 1024);
  return static_cast<std::uint16_t>(sign | static_cast<unsigned>(rounded_exponent + 15) << 10 | mantissa);
}

float from_float16(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  if (exponent == 31) {
    magnitude = mantissa != 0 ? NAN : INFINITY;
  }
  if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  }
  return (bits & 0x8000U) != 0 ? -magnitude : magnitude;
}

std::uint16_t to_bfloat16(float x) {
  if (std::isnan(x)) {
    return 0x7fff;
  }
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t dropped = bits & 0xffffU;
  std::uint32_t kept = bits >> 16;
  if (dropped > 0x8000U || (dropped == 0x8000U && (kept & 1U) != 0)) {
    ++kept;
  }
  return static_cast<std::uint16_t>(kept);
}

float from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

namespace {

template <class F>
F integral(F x, Rounding rounding) {
  switch (rounding) {
    case Rounding::rni: return std::nearbyint(x);
    case Rounding::rzi: return std::trunc(x);
    case Rounding::rmi: return std::floor(x);
    case Rounding::rpi: return std::ceil(x);
    default: return x;
  }
}

double float_value(Type type, std::uint64_t bits) {
  switch (type) {
    case Type::f16: return from_float16(static_cast<std::uint16_t>(bits));
    case Type::bf16: return from_bfloat16(static_cast<std::uint16_t>(bits));
    case Type::f32: return decode<float>(bits);
    default: return decode<double>(bits);
  }
}

/// Values outside of the type's range become its nearest value.
std::uint64_t to_integer(double value, Rounding rounding, Type from, Type to) {
  const double x = integral(value, rounding);
  const int bytes = size_of(to);
  const int width = 8 * bytes;
  if (std::isnan(x)) {
    // 0, but of float64 or to 64 bits: the highest bit.
    return from == Type::f64 || bytes == 8 ? std::uint64_t{1} << (width - 1) : 0;
  }
  if (is_signed(to)) {
    const double limit = std::ldexp(1.0, width - 1);
    if (x >= limit) {
      return truncated(~(std::uint64_t{1} << (width - 1)), bytes);
    }
    if (x < -limit) {
      return std::uint64_t{1} << (width - 1);
    }
    return truncated(static_cast<std::uint64_t>(static_cast<std::int64_t>(x)), bytes);
  }
  if (x <= 0) {
    return 0;
  }
  return x >= std::ldexp(1.0, width) ? truncated(~std::uint64_t{0}, bytes) : static_cast<std::uint64_t>(x);
}

/// fma with a rounding other than to nearest.
template <class F>
__attribute__((noinline)) void fma_rounded(Rounding rounding, Mask mask, const Operands& x, std::uint64_t* result) {
  const int before = std::fegetround();
  std::fesetround(rounding == Rounding::rm ? FE_DOWNWARD : rounding == Rounding::rp ? FE_UPWARD : FE_TOWARDZERO);
  for_lanes(mask, [&](int l) {
    volatile F a = decode<F>(x.a[l]);
    volatile F b = decode<F>(x.b[l]);
    volatile F c = decode<F>(x.c[l]);
    volatile F sum = std::fma(a, b, c);
    result[l] = encode(static_cast<F>(sum));
  });
  std::fesetround(before);
}

/// The smaller or larger of two numbers. NaN loses against a number, and -0 is smaller than 0.
template <class F>
F extremum(bool smaller, F a, F b) {
  if (std::isnan(a)) {
    return b;
  }
  if (std::isnan(b)) {
    return a;
  }
  if (a == b) {
    return std::signbit(a) == smaller ? a : b;
  }
  return (a < b) == smaller ? a : b;
}

template <class F>
void compute_float(const Instruction& i, Mask mask, const Operands& x, std::uint64_t* result) {
  const auto unary = [&](auto f) { for_lanes(mask, [&](int l) { result[l] = encode(f(decode<F>(x.a[l]))); }); };
  const auto binary = [&](auto f) {
    for_lanes(mask, [&](int l) { result[l] = encode(f(decode<F>(x.a[l]), decode<F>(x.b[l]))); });
  };
  constexpr std::uint64_t sign = std::uint64_t{1} << (8 * sizeof(F) - 1);
  switch (i.op) {
    case Op::add: binary([](F a, F b) { return a + b; }); return;
    case Op::sub: binary([](F a, F b) { return a - b; }); return;
    case Op::mul_lo: binary([](F a, F b) { return a * b; }); return;
    case Op::div: binary([](F a, F b) { return a / b; }); return;
    case Op::min: binary([](F a, F b) { return extremum(true, a, b); }); return;
    case Op::max: binary([](F a, F b) { return extremum(false, a, b); }); return;
    case Op::sqrt: unary([](F a) { return std::sqrt(a); }); return;
    case Op::neg: for_lanes(mask, [&](int l) { result[l] = x.a[l] ^ sign; }); return;
    case Op::abs: for_lanes(mask, [&](int l) { result[l] = x.a[l] & ~sign; }); return;
    case Op::copysign:  // The sign of a, the magnitude of b.
      for_lanes(mask, [&](int l) { result[l] = (x.a[l] & sign) | (x.b[l] & ~sign); });
      return;
    case Op::fma:
      if (i.rounding == Rounding::rn) {
        for_lanes(mask, [&](int l) {
          result[l] = encode(std::fma(decode<F>(x.a[l]), decode<F>(x.b[l]), decode<F>(x.c[l])));
        });
      } else {
        fma_rounded<F>(i.rounding, mask, x, result);
      }
      return;
    // The approximate instructions return the correctly rounded result, which a GPU may miss by a unit in the last
    // place.
    case Op::rcp:
      if (!i.approximate) {
        unary([](F a) { return F{1} / a; });
      } else if constexpr (sizeof(F) == 4) {
        unary([&](F a) {
          const auto inverse = static_cast<F>(1.0 / static_cast<double>(i.ftz ? flushed(a) : a));
          return i.ftz ? flushed(inverse) : inverse;
        });
      } else {  // From the upper half of a double to the upper half.
        constexpr std::uint64_t upper = 0xffffffff00000000U;
        for_lanes(
            mask, [&](int l) { result[l] = encode(flushed(1.0 / flushed(decode<double>(x.a[l] & upper)))) & upper; });
      }
      return;
    case Op::ex2:
      unary([&](F a) {
        const auto power = static_cast<F>(std::exp2(static_cast<double>(i.ftz ? flushed(a) : a)));
        return i.ftz ? flushed(power) : power;
      });
      return;
    case Op::lg2:
      unary([&](F a) { return static_cast<F>(std::log2(static_cast<double>(i.ftz ? flushed(a) : a))); });
      return;
    default: return;
  }
}

/// Packed comparison of two halves: all bits of a half in which it holds.
void compute_set(const Instruction& i, Mask mask, const Operands& x, std::uint64_t* result) {
  for_lanes(mask, [&](int l) {
    std::uint64_t halves = 0;  // The result may be one of the operands.
    for (int half = 0; half < 2; ++half) {
      const auto a = static_cast<std::uint16_t>(x.a[l] >> (16 * half));
      const auto b = static_cast<std::uint16_t>(x.b[l] >> (16 * half));
      const bool holds = i.operand_type == Type::f16x2 ? compare(i.comparison, from_float16(a), from_float16(b))
                                                       : compare(i.comparison, from_bfloat16(a), from_bfloat16(b));
      if (holds) {
        halves |= std::uint64_t{0xffff} << (16 * half);
      }
    }
    result[l] = halves;
  });
}

void compute_setp(const Instruction& i, Mask mask, const Operands& x, std::uint64_t* result) {
  const int bytes = size_of(i.operand_type);
  const auto each = [&](auto value) {
    for_lanes(mask, [&](int l) { result[l] = compare(i.comparison, value(x.a[l]), value(x.b[l])) ? 1 : 0; });
  };
  if (i.operand_type == Type::f32) {
    each([](std::uint64_t bits) { return decode<float>(bits); });
  } else if (i.operand_type == Type::f64) {
    each([](std::uint64_t bits) { return decode<double>(bits); });
  } else if (is_signed(i.operand_type)) {
    each([&](std::uint64_t bits) { return sign_extended(bits, bytes); });
  } else {
    each([&](std::uint64_t bits) { return truncated(bits, bytes); });
  }
}

/// Bits [position, position + length) of `into` replaced by the lowest of `bits`.
std::uint64_t insert_bits(std::uint64_t bits, std::uint64_t into, unsigned position, unsigned length, unsigned width) {
  for (unsigned k = 0; k < length && position + k < width; ++k) {
    const std::uint64_t bit = std::uint64_t{1} << (position + k);
    into = (into & ~bit) | ((bits >> k & 1U) != 0 ? bit : 0);
  }
  return into;
}

/// Bits [position, position + length) as a number; the sign bit of a signed field is repeated above it.
std::uint64_t extract_bits(
    std::uint64_t bits, unsigned position, unsigned length, unsigned width, bool is_signed_field) {
  const bool sign = is_signed_field && length > 0 && (bits >> std::min(position + length - 1, width - 1) & 1U) != 0;
  std::uint64_t result = 0;
  for (unsigned k = 0; k < width; ++k) {
    const bool inside = k < length && position + k < width;
    if (inside ? (bits >> (position + k) & 1U) != 0 : sign) {
      result |= std::uint64_t{1} << k;
    }
  }
  return result;
}

/// Four bytes selected from the eight of a and b. Bit 3 of a selector repeats the byte's sign instead.
std::uint64_t permute_bytes(std::uint64_t a, std::uint64_t b, std::uint64_t selectors) {
  const std::uint64_t both = truncated(a, 4) | b << 32;
  std::uint64_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const std::uint64_t selector = selectors >> (4 * k) & 15U;
    std::uint64_t byte = both >> (8 * (selector & 7U)) & 0xffU;
    if ((selector & 8U) != 0) {
      byte = (byte & 0x80U) != 0 ? 0xff : 0;
    }
    result |= byte << (8 * k);
  }
  return result;
}

Mask divide(const Instruction& i, Mask mask, const Operands& x, std::uint64_t* result) {
  const int bytes = size_of(i.type);
  const bool quotient = i.op == Op::div;
  Mask by_zero = 0;
  for_lanes(mask, [&](int l) {
    const std::uint64_t a = truncated(x.a[l], bytes);
    const std::uint64_t b = truncated(x.b[l], bytes);
    if (b == 0) {
      by_zero |= Mask{1} << l;
      result[l] = quotient ? truncated(~std::uint64_t{0}, bytes) : a;
    } else if (!is_signed(i.type)) {
      result[l] = quotient ? a / b : a % b;
    } else if (b == truncated(~std::uint64_t{0}, bytes)) {  // Division by -1, which overflows for the smallest number.
      result[l] = quotient ? truncated(~a + 1, bytes) : 0;
    } else {
      const std::int64_t p = sign_extended(a, bytes);
      const std::int64_t q = sign_extended(b, bytes);
      result[l] = truncated(static_cast<std::uint64_t>(quotient ? p / q : p % q), bytes);
    }
  });
  return by_zero;
}

/// The upper half of a product.
std::uint64_t multiply_high(std::uint64_t a, std::uint64_t b, int bytes, bool is_signed_product) {
  if (is_signed_product) {
    const auto product = static_cast<__int128>(sign_extended(a, bytes)) * sign_extended(b, bytes);
    return truncated(static_cast<std::uint64_t>(product >> (8 * bytes)), bytes);
  }
  const auto product = static_cast<unsigned __int128>(truncated(a, bytes)) * truncated(b, bytes);
  return static_cast<std::uint64_t>(product >> (8 * bytes));
}

Mask compute_integer(const Instruction& i, Mask mask, const Operands& x, std::uint64_t* result) {
  const int bytes = size_of(i.type);
  const auto width = static_cast<unsigned>(8 * bytes);
  const bool is_signed_op = is_signed(i.type);
  const auto each = [&](auto f) { for_lanes(mask, [&](int l) { result[l] = f(l); }); };
  const auto number = [&](std::uint64_t bits) {  // Two's complement: products and sums need no other distinction.
    return is_signed_op ? static_cast<std::uint64_t>(sign_extended(bits, bytes)) : truncated(bits, bytes);
  };
  switch (i.op) {
    case Op::add: each([&](int l) { return truncated(x.a[l] + x.b[l], bytes); }); break;
    case Op::sub: each([&](int l) { return truncated(x.a[l] - x.b[l], bytes); }); break;
    case Op::mul_lo: each([&](int l) { return truncated(x.a[l] * x.b[l], bytes); }); break;
    case Op::mul_hi: each([&](int l) { return multiply_high(x.a[l], x.b[l], bytes, is_signed_op); }); break;
    case Op::mul_wide: each([&](int l) { return truncated(number(x.a[l]) * number(x.b[l]), 2 * bytes); }); break;
    case Op::mad_lo: each([&](int l) { return truncated(x.a[l] * x.b[l] + x.c[l], bytes); }); break;
    case Op::mad_wide:
      each([&](int l) { return truncated(number(x.a[l]) * number(x.b[l]) + x.c[l], 2 * bytes); });
      break;
    case Op::div:
    case Op::rem: return divide(i, mask, x, result);
    case Op::shl:
      each([&](int l) {
        const auto n = static_cast<std::uint32_t>(x.b[l]);
        return n >= width ? 0 : truncated(x.a[l] << n, bytes);
      });
      break;
    case Op::shr:
      each([&](int l) {
        const auto n = static_cast<std::uint32_t>(x.b[l]);
        if (is_signed_op) {
          const std::int64_t shifted = sign_extended(x.a[l], bytes) >> std::min(n, width - 1);
          return truncated(static_cast<std::uint64_t>(shifted), bytes);
        }
        return n >= width ? 0 : truncated(x.a[l], bytes) >> n;
      });
      break;
    case Op::bit_and: each([&](int l) { return x.a[l] & x.b[l]; }); break;
    case Op::bit_or: each([&](int l) { return x.a[l] | x.b[l]; }); break;
    case Op::bit_xor: each([&](int l) { return x.a[l] ^ x.b[l]; }); break;
    case Op::bit_not:
      each([&](int l) { return i.type == Type::pred ? (x.a[l] & 1U) ^ 1U : truncated(~x.a[l], bytes); });
      break;
    case Op::neg: each([&](int l) { return truncated(~x.a[l] + 1, bytes); }); break;
    case Op::abs:
      each([&](int l) { return truncated(sign_extended(x.a[l], bytes) < 0 ? ~x.a[l] + 1 : x.a[l], bytes); });
      break;
    case Op::min:
    case Op::max:
      each([&](int l) {
        const bool less = is_signed_op ? sign_extended(x.a[l], bytes) < sign_extended(x.b[l], bytes)
                                       : truncated(x.a[l], bytes) < truncated(x.b[l], bytes);
        return less == (i.op == Op::min) ? x.a[l] : x.b[l];
      });
      break;
    case Op::popc:
      each([&](int l) { return static_cast<std::uint64_t>(std::popcount(truncated(x.a[l], bytes))); });
      break;
    case Op::bfi:
      each([&](int l) { return insert_bits(x.a[l], x.b[l], x.c[l] & 0xffU, x.d[l] & 0xffU, width); });
      break;
    case Op::bfe:
      each([&](int l) {
        return extract_bits(truncated(x.a[l], bytes), x.b[l] & 0xffU, x.c[l] & 0xffU, width, is_signed_op);
      });
      break;
    case Op::prmt: each([&](int l) { return permute_bytes(x.a[l], x.b[l], x.c[l]); }); break;
    default: break;
  }
  return 0;
}

}  // namespace

std::uint64_t convert(const Instruction& i, std::uint64_t bits) {
  if (is_float(i.operand_type)) {
    const double value = float_value(i.operand_type, bits);
    switch (i.type) {
      case Type::f16: return to_float16(static_cast<float>(value));
      case Type::bf16: return to_bfloat16(static_cast<float>(value));
      case Type::f64: return encode(integral(value, i.rounding));
      case Type::f32: {
        const float x = integral(static_cast<float>(value), i.rounding);
        if (!i.saturated) {
          return encode(x);
        }
        return encode(x > 0 ? std::min(x, 1.0F) : 0.0F);  // NaN too becomes 0.
      }
      default: return to_integer(value, i.rounding, i.operand_type, i.type);
    }
  }
  const int bytes = size_of(i.operand_type);
  if (is_signed(i.operand_type)) {
    const std::int64_t x = sign_extended(bits, bytes);
    if (i.type == Type::f32) {
      return encode(static_cast<float>(x));
    }
    if (i.type == Type::f64) {
      return encode(static_cast<double>(x));
    }
    return truncated(static_cast<std::uint64_t>(x), size_of(i.type));
  }
  const std::uint64_t x = truncated(bits, bytes);
  if (i.type == Type::f32) {
    return encode(static_cast<float>(x));
  }
  if (i.type == Type::f64) {
    return encode(static_cast<double>(x));
  }
  return truncated(x, size_of(i.type));
}

Mask compute(const Instruction& i, Mask mask, const Operands& x, std::uint64_t* result) {
  switch (i.op) {
    case Op::mov:
    case Op::cvta: for_lanes(mask, [&](int l) { result[l] = x.a[l]; }); return 0;
    case Op::cvt:
      for_lanes(mask, [&](int l) {
        const std::uint64_t bits = convert(i, x.a[l]);
        result[l] = is_signed(i.type)
                        ? truncated(static_cast<std::uint64_t>(sign_extended(bits, size_of(i.type))), i.register_bytes)
                        : bits;
      });
      return 0;
    case Op::setp: compute_setp(i, mask, x, result); return 0;
    case Op::set: compute_set(i, mask, x, result); return 0;
    default: break;
  }
  if (i.type == Type::f32) {
    compute_float<float>(i, mask, x, result);
  } else if (i.type == Type::f64) {
    compute_float<double>(i, mask, x, result);
  } else {
    return compute_integer(i, mask, x, result);
  }
  return 0;
}

}  // namespace emulator
