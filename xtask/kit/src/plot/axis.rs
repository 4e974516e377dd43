//! Axes: which numbers stand at them, and where a value lies.

/// How values are spread along an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scale {
    /// Evenly, from zero where the values are near it.
    Linear,
    /// By their logarithm. Values that are not positive are left out.
    Log,
}

/// An axis of a plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    pub(super) label: String,
    pub(super) scale: Scale,
}

impl Axis {
    /// Linear, with what stands at it: the quantity and its unit.
    pub fn new(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            scale: Scale::Linear,
        }
    }

    /// Logarithmic.
    pub fn log(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            scale: Scale::Log,
        }
    }

    /// Whether a value has a place on it.
    pub(super) fn takes(&self, value: f64) -> bool {
        value.is_finite() && (self.scale == Scale::Linear || value > 0.0)
    }

    /// The range of `values`, widened to whole ticks, and the ticks.
    pub(super) fn fit(&self, values: impl Iterator<Item = f64>) -> Fitted {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| self.takes(*value)) {
            low = low.min(value);
            high = high.max(value);
        }
        if low > high {
            (low, high) = (1.0, 1.0);
        }
        match self.scale {
            Scale::Linear => Fitted::linear(low, high),
            Scale::Log => Fitted::log(low, high),
        }
    }
}

/// An axis with its range.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fitted {
    scale: Scale,
    low: f64,
    high: f64,
    pub(super) ticks: Vec<f64>,
}

impl Fitted {
    pub(super) fn linear(low: f64, high: f64) -> Self {
        // A plot that does not begin at zero makes small differences look large.
        let low = if low >= 0.0 && low < 0.6 * high {
            0.0
        } else {
            low
        };
        let span = if high > low {
            high - low
        } else {
            high.abs().max(1.0)
        };
        let step = step_for(span / 5.0);
        let first = (low / step).floor();
        let last = (high / step).ceil().max(first + 1.0);
        let count = (last - first).round() as usize;
        let ticks: Vec<f64> = (0..=count).map(|i| (first + i as f64) * step).collect();
        Self {
            scale: Scale::Linear,
            low: first * step,
            high: last * step,
            ticks,
        }
    }

    fn log(low: f64, high: f64) -> Self {
        let first = low.log10().floor();
        let last = high.log10().ceil().max(first + 1.0);
        let every = ((last - first) / 6.0).ceil().max(1.0);
        let count = ((last - first) / every).floor() as usize;
        let mut ticks: Vec<f64> = (0..=count)
            .map(|i| 10f64.powf(first + i as f64 * every))
            .collect();
        if count < 3 {
            // Too few powers of ten to read by: the twos and fives between them as well.
            let powers = ticks.clone();
            ticks.extend(powers.iter().flat_map(|tick| [2.0 * tick, 5.0 * tick]));
            ticks.retain(|tick| *tick <= 10f64.powf(last) * 1.000_001);
            ticks.sort_by(f64::total_cmp);
        }
        Self {
            scale: Scale::Log,
            low: 10f64.powf(first),
            high: 10f64.powf(last),
            ticks,
        }
    }

    /// Where `value` lies between both ends: 0 to 1.
    pub(super) fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).log10() / (self.high / self.low).log10(),
        }
    }
}

/// The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `least`.
fn step_for(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= least * 0.999_999)
        .unwrap_or(10.0 * power)
}

#[cfg(test)]
mod tests {
    use super::{Axis, Fitted};

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        assert_eq!(
            Fitted::linear(0.0, 9.7).ticks,
            [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
        );
        assert_eq!(Fitted::linear(990.0, 1000.0).ticks[0], 990.0);
        let log = Axis::log("x").fit([0.3, 400.0].into_iter());
        assert_eq!(log.place(0.1), 0.0);
        assert!((log.place(1000.0) - 1.0).abs() < 1e-9);
        assert!(log.ticks.len() >= 4);
    }
}
