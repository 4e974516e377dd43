//! A number with a unit, as people write them: `64 KiB`, `1.5GB`, `25 GB/s`.

use std::fmt;

/// Decimal (SI) and binary (IEC 80000-13) multiples of a byte.
const UNITS: [(&str, u64); 13] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("m", 1 << 20),
    ("g", 1 << 30),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

/// Why a text is not a quantity of bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseQuantityError {
    text: String,
    expected: &'static str,
}

impl ParseQuantityError {
    pub(crate) fn new(text: &str, expected: &'static str) -> Self {
        Self {
            text: text.to_owned(),
            expected,
        }
    }
}

impl fmt::Display for ParseQuantityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is not {}", self.text, self.expected)
    }
}

impl std::error::Error for ParseQuantityError {}

/// Bytes in `text`, or `None` where it is no number, negative, or more than 2^64 - 1.
pub(crate) fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim().to_ascii_lowercase();
    let scale = UNITS.iter().find(|(name, _)| *name == unit)?.1;
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale);
    }
    let value = number.parse::<f64>().ok()? * scale as f64;
    // 2^64 is the first f64 that does not fit.
    (value.is_finite() && value < 18_446_744_073_709_551_616.0).then_some(value.round() as u64)
}

/// Writes `bytes` with at most two decimals in the largest binary unit that keeps it at least one.
pub(crate) fn fmt_binary(bytes: u64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    const NAMES: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let step = bytes.checked_ilog2().unwrap_or(0) / 10;
    fmt_scaled(
        bytes as f64 / (1u64 << (10 * step)) as f64,
        NAMES[step as usize],
        f,
    )
}

/// The same in decimal units, as link speeds are quoted.
pub(crate) fn fmt_decimal(bytes: u64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    const NAMES: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let step = bytes.checked_ilog10().unwrap_or(0) / 3;
    fmt_scaled(
        bytes as f64 / 1000f64.powi(step as i32),
        NAMES[step as usize],
        f,
    )
}

fn fmt_scaled(value: f64, unit: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    f.pad(&format!("{text} {unit}"))
}
