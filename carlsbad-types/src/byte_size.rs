use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};
use std::str::FromStr;

use crate::quantity::{ParseQuantityError, fmt_binary, parse_bytes};

/// A number of bytes.
///
/// Shown in binary units (`2.25 MiB`); read from binary or decimal ones (`64KiB`, `1.5 GB`, `10M`,
/// where a bare `K`, `M` or `G` is binary as in `dd` and `fallocate`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(transparent)
)]
pub struct ByteSize(u64);

impl ByteSize {
    /// No bytes.
    pub const ZERO: Self = Self(0);
    /// The largest size that can be named.
    pub const MAX: Self = Self(u64::MAX);

    /// `n` bytes.
    pub const fn new(n: u64) -> Self {
        Self(n)
    }

    /// `n` x 1,024 bytes, saturating.
    pub const fn kib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 10))
    }

    /// `n` x 1,048,576 bytes, saturating.
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 20))
    }

    /// `n` x 2^30 bytes, saturating.
    pub const fn gib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 30))
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The sum, or `None` on overflow.
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(n) => Some(Self(n)),
            None => None,
        }
    }

    /// What is left of `self` without `other`, at least zero.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// The next multiple of `unit` (at least one byte), or `None` on overflow.
    pub const fn round_up(self, unit: Self) -> Option<Self> {
        match self.0.checked_next_multiple_of(unit.0) {
            Some(n) => Some(Self(n)),
            None => None,
        }
    }

    /// `self / whole` as a ratio; 0 where both are zero.
    pub fn ratio_of(self, whole: Self) -> f64 {
        if self.0 == 0 {
            0.0
        } else {
            self.0 as f64 / whole.0 as f64
        }
    }
}

/// Saturating: a sum of sizes that does not fit in 64 bits is more than any machine has.
impl Add for ByteSize {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for ByteSize {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for ByteSize {
    fn sum<I: Iterator<Item = Self>>(sizes: I) -> Self {
        sizes.fold(Self::ZERO, Add::add)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_binary(self.0, f)
    }
}

impl FromStr for ByteSize {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_bytes(text).map(Self).ok_or_else(|| {
            ParseQuantityError::new(text, "a size such as `4096`, `64KiB` or `1.5 GB`")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::ByteSize;

    #[test]
    fn shows_the_largest_binary_unit() {
        for (bytes, shown) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (2_359_296, "2.25 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(ByteSize::new(bytes).to_string(), shown);
        }
    }

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("4096", 4096),
            ("64KiB", 65_536),
            (" 64 kib ", 65_536),
            ("10M", 10 << 20),
            ("1.5 GB", 1_500_000_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap().get(), bytes, "{text}");
        }
        for text in [
            "",
            "KiB",
            "-1",
            "1..2",
            "1 parsec",
            "18446744073709551616",
            "99999999999 TiB",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_shown_reads_back_within_its_two_decimals(bytes: u64) {
            let size = ByteSize::new(bytes);
            let text = size.to_string().replace("PiB", "KiB").replace("EiB", "KiB");
            let back = text.parse::<ByteSize>().unwrap().get() as f64;
            if bytes < 1 << 50 {
                proptest::prop_assert!((back - bytes as f64).abs() <= 0.0051 * bytes as f64);
            }
        }
    }
}
