//! Quantity: a number as Kubernetes writes it: an integer with a decimal suffix, never a fraction.
//!
//! The canonical form of `resource.Quantity` (apimachinery): no fractional digits, and the largest suffix that keeps the
//! number whole.

/// `1500m`, `15`, `2k`. Parts of a thousandth are rounded up, as Kubernetes does; what is below zero or no number is 0.
pub fn quantity(value: f64) -> String {
    let milli = (value * 1000.0 - ROUNDING).ceil();
    if milli.is_nan() || milli < 1.0 {
        return "0".to_owned();
    }
    let mut number = if milli >= MILLI_MAX { MILLI_MAX as u64 } else { milli as u64 };
    let mut suffix = 0;
    while number % 1000 == 0 && suffix + 1 < SUFFIXES.len() {
        number /= 1000;
        suffix += 1;
    }
    format!("{number}{}", SUFFIXES[suffix])
}

const SUFFIXES: [&str; 6] = ["m", "", "k", "M", "G", "T"];

/// 0.375 × 1000 is 375, not 375.00000000000006.
const ROUNDING: f64 = 1e-6;

/// The largest power of ten below 2^63, which Kubernetes can still hold.
const MILLI_MAX: f64 = 1e18;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn as_kubernetes_writes_them() {
        for (value, text) in [
            (0.0, "0"),
            (15.0, "15"),
            (1.5, "1500m"),
            (0.375, "375m"),
            (1.0 / 3.0, "334m"),
            (0.000_4, "1m"),
            (1000.0, "1k"),
            (1500.0, "1500"),
            (1_000_000.0, "1M"),
            (-1.0, "0"),
            (f64::NAN, "0"),
            (f64::INFINITY, "1000T"),
        ] {
            assert_eq!(quantity(value), text, "{value}");
        }
    }

    fn parse(text: &str) -> f64 {
        let digits = text.trim_end_matches(|character: char| !character.is_ascii_digit());
        let factor = match &text[digits.len()..] {
            "m" => 1e-3,
            "" => 1.0,
            "k" => 1e3,
            "M" => 1e6,
            "G" => 1e9,
            "T" => 1e12,
            other => panic!("{other}"),
        };
        digits.parse::<u64>().unwrap() as f64 * factor
    }

    proptest! {
        #[test]
        fn it_is_never_less_and_never_much_more(value in 0.0..1e9f64) {
            let read = parse(&quantity(value));
            prop_assert!(read >= value - 1e-6 && read <= value + 0.001 + 1e-6, "{} for {}", read, value);
        }

        #[test]
        fn whole_numbers_stay_what_they_are(value in 0u64..1_000_000_000) {
            prop_assert_eq!(parse(&quantity(value as f64)), value as f64);
        }
    }
}
