//! Timings of ours and of the rival, taken in turn, so that whatever else the machine does falls
//! on both.

use std::time::{Duration, Instant};

/// Samples of ours and of the rival, in the order in which they were taken.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Interleaved {
    /// Ours.
    pub ours: Vec<f64>,
    /// The rival's.
    pub rival: Vec<f64>,
}

impl Interleaved {
    /// Median of ours over median of the rival's: below 1 is smaller or faster.
    pub fn ratio(&self) -> f64 {
        median(&self.ours) / median(&self.rival)
    }
}

/// Takes `rounds` samples of each after `warm_up` rounds that are thrown away. Who goes first
/// alternates, so that neither always finds the caches as the other left them.
pub fn interleave(
    warm_up: usize,
    rounds: usize,
    mut ours: impl FnMut() -> f64,
    mut rival: impl FnMut() -> f64,
) -> Interleaved {
    let mut samples = Interleaved::default();
    for round in 0..warm_up + rounds {
        let (a, b);
        if round % 2 == 0 {
            a = ours();
            b = rival();
        } else {
            b = rival();
            a = ours();
        }
        if round >= warm_up {
            samples.ours.push(a);
            samples.rival.push(b);
        }
    }
    samples
}

/// How long `work` takes, and what it gives.
pub fn time<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = work();
    (start.elapsed(), result)
}

/// How long `work` takes, in milliseconds; its result is dropped after the clock has stopped.
pub fn time_ms<T>(work: impl FnOnce() -> T) -> f64 {
    let (elapsed, result) = time(work);
    drop(std::hint::black_box(result));
    elapsed.as_secs_f64() * 1e3
}

/// The middle sample; the mean of the two middle ones of an even number; NaN of none.
pub fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

/// The sample below which the share `q` of all lies, interpolated linearly; NaN of none.
pub fn quantile(samples: &[f64], q: f64) -> f64 {
    if samples.is_empty() {
        return f64::NAN;
    }
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = q.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

#[cfg(test)]
mod tests {
    use super::{interleave, median, quantile};

    #[test]
    fn medians_and_quantiles_of_small_sets() {
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[9.0, 1.0]), 5.0);
        assert_eq!(median(&[5.0, 100.0, 1.0]), 5.0);
        assert_eq!(quantile(&[0.0, 10.0], 0.9), 9.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn both_are_sampled_in_turn_and_the_first_alternates() {
        let log = std::cell::RefCell::new(String::new());
        let push = |who: char| {
            log.borrow_mut().push(who);
            log.borrow().len() as f64
        };
        let samples = interleave(1, 3, || push('o'), || push('r'));
        assert_eq!(log.into_inner(), "orroorro");
        assert_eq!(samples.ours, [4.0, 5.0, 8.0]);
        assert_eq!(samples.rival, [3.0, 6.0, 7.0]);
    }
}
