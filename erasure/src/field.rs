//! The field: GF(2^8) with polynomial x^8 + x^4 + x^3 + x^2 + 1 (0x11d).
//!
//! Addition is exclusive or. The same field as ISA-L's and most storage codecs', so a parity can be checked
//! with another tool. GFNI's own multiply is of the AES field (0x11b), so the kernels multiply by an 8×8 bit
//! matrix instead, which serves any polynomial.

/// The reduction polynomial without its x^8 term.
const POLYNOMIAL: u8 = 0x1d;

/// a · b.
pub(crate) const fn mul(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        if b & 1 != 0 {
            product ^= a;
        }
        let carry = a & 0x80 != 0;
        a <<= 1;
        if carry {
            a ^= POLYNOMIAL;
        }
        b >>= 1;
    }
    product
}

/// 1 / a. `a` must not be 0.
pub(crate) const fn inverse(a: u8) -> u8 {
    assert!(a != 0, "0 has no inverse");
    LOGARITHMS.power[255 - LOGARITHMS.of[a as usize] as usize]
}

/// a · b by logarithms, for the few products of a plan: some times faster than [`mul`].
pub(crate) fn product(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 {
        return 0;
    }
    let of = |a: u8| usize::from(LOGARITHMS.of[usize::from(a)]);
    LOGARITHMS.power[of(a) + of(b)]
}

/// Powers of x, which generates every element but 0, and what power each element is.
struct Logarithms {
    /// Of 0 it means nothing.
    of: [u8; 256],
    /// Twice over, so that the sum of two logarithms needs no reduction.
    power: [u8; 2 * 255],
}

static LOGARITHMS: Logarithms = {
    let mut of = [0; 256];
    let mut power = [0; 2 * 255];
    let mut element = 1;
    let mut exponent = 0;
    while exponent < 255 {
        of[element as usize] = exponent as u8;
        power[exponent] = element;
        power[exponent + 255] = element;
        element = mul(element, 2);
        exponent += 1;
    }
    Logarithms { of, power }
};

/// Products of one coefficient with each low and each high nibble: what a byte shuffle looks up.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct NibbleProducts {
    /// c · x for x in 0 … 15.
    pub(crate) low: [u8; 16],
    /// c · (x << 4) for x in 0 … 15.
    pub(crate) high: [u8; 16],
}

/// [`NibbleProducts`] of every coefficient, 8 KiB.
pub(crate) static NIBBLE_PRODUCTS: [NibbleProducts; 256] = {
    let mut table = [NibbleProducts {
        low: [0; 16],
        high: [0; 16],
    }; 256];
    let mut c = 0;
    while c < 256 {
        let mut x = 0;
        while x < 16 {
            table[c].low[x] = mul(c as u8, x as u8);
            table[c].high[x] = mul(c as u8, (x as u8) << 4);
            x += 1;
        }
        c += 1;
    }
    table
};

/// Multiplication by each coefficient as the 8×8 bit matrix of GF2P8AFFINEQB, 2 KiB.
///
/// Byte 7 − i of a matrix selects the input bits whose parity is output bit i (Intel SDM, "GF2P8AFFINEQB").
#[cfg(any(target_arch = "x86_64", test))]
pub(crate) static BIT_MATRICES: [u64; 256] = {
    let mut table = [0; 256];
    let mut c = 0;
    while c < 256 {
        let mut matrix = 0u64;
        let mut input = 0;
        while input < 8 {
            let column = mul(c as u8, 1 << input);
            let mut output = 0;
            while output < 8 {
                if column >> output & 1 != 0 {
                    matrix |= 1 << (8 * (7 - output) + input);
                }
                output += 1;
            }
            input += 1;
        }
        table[c] = matrix;
        c += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_known_by_hand_hold() {
        // x · x^7 = x^8 = x^4 + x^3 + x^2 + 1.
        assert_eq!(mul(0x02, 0x80), 0x1d);
        assert_eq!(mul(0x80, 0x02), 0x1d);
        assert_eq!(mul(1, 0xa7), 0xa7);
        assert_eq!(mul(0, 0xa7), 0);
        // (x + 1)(x^2 + 1) = x^3 + x^2 + x + 1.
        assert_eq!(mul(0x03, 0x05), 0x0f);
    }

    #[test]
    fn every_element_but_zero_has_an_inverse() {
        for a in 1..=255 {
            assert_eq!(mul(a, inverse(a)), 1);
        }
    }

    #[test]
    fn logarithms_multiply() {
        for a in 0..=255 {
            for b in 0..=255 {
                assert_eq!(product(a, b), mul(a, b));
            }
        }
    }

    #[test]
    fn nibble_products_add_up_to_the_product() {
        for c in 0..=255u8 {
            let products = &NIBBLE_PRODUCTS[usize::from(c)];
            for x in 0..=255u8 {
                let sum = products.low[usize::from(x & 15)] ^ products.high[usize::from(x >> 4)];
                assert_eq!(sum, mul(c, x));
            }
        }
    }

    #[test]
    fn bit_matrices_multiply() {
        for c in 0..=255u8 {
            let matrix = BIT_MATRICES[usize::from(c)].to_le_bytes();
            for x in 0..=255u8 {
                let product = (0..8).fold(0u8, |byte, bit| {
                    let parity = (matrix[7 - bit] & x).count_ones() as u8 & 1;
                    byte | parity << bit
                });
                assert_eq!(product, mul(c, x));
            }
        }
    }
}
