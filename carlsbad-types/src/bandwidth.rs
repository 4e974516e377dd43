use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::ByteSize;
use crate::quantity::{ParseQuantityError, fmt_decimal, parse_bytes};

/// Bytes a second.
///
/// Shown in decimal units, as links and memories are quoted (`25.6 GB/s`); read from either kind,
/// with `/s` at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(transparent)
)]
pub struct Bandwidth(u64);

impl Bandwidth {
    /// `n` bytes a second.
    pub const fn bytes_per_second(n: u64) -> Self {
        Self(n)
    }

    /// What moving `bytes` in `time` amounts to; saturates where `time` is zero.
    pub fn measured(bytes: ByteSize, time: Duration) -> Self {
        Self((bytes.get() as f64 / time.as_secs_f64()) as u64)
    }

    /// Bytes a second.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// How long `bytes` take at this rate; `Duration::MAX` where that is longer, as at a rate of zero.
    pub fn time_for(self, bytes: ByteSize) -> Duration {
        if bytes == ByteSize::ZERO {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(bytes.get() as f64 / self.0 as f64).unwrap_or(Duration::MAX)
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_decimal(self.0, f)?;
        f.write_str("/s")
    }
}

impl FromStr for Bandwidth {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.trim()
            .strip_suffix("/s")
            .and_then(parse_bytes)
            .map(Self)
            .ok_or_else(|| ParseQuantityError::new(text, "a rate such as `25 GB/s` or `64MiB/s`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_and_reads_decimal_rates() {
        let link = Bandwidth::bytes_per_second(25_600_000_000);
        assert_eq!(link.to_string(), "25.6 GB/s");
        assert_eq!("25.6 GB/s".parse(), Ok(link));
        assert!("25.6 GB".parse::<Bandwidth>().is_err());
    }

    #[test]
    fn a_rate_of_zero_takes_for_ever_except_for_nothing() {
        let stopped = Bandwidth::bytes_per_second(0);
        assert_eq!(stopped.time_for(ByteSize::new(1)), Duration::MAX);
        assert_eq!(stopped.time_for(ByteSize::ZERO), Duration::ZERO);
    }

    #[test]
    fn no_time_at_all_saturates() {
        assert_eq!(
            Bandwidth::measured(ByteSize::new(1), Duration::ZERO).get(),
            u64::MAX
        );
    }
}
