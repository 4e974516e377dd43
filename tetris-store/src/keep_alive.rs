//! How long an idle instance stays, and when it is loaded ahead of its next call.
//!
//! | policy | keeps |
//! |---|---|
//! | [`Fixed`] | every instance equally long; clouds use some 10 to 20 minutes |
//! | [`Histogram`] | by the function's own idle times, and unloads it in between where they are regular ("Serverless in the Wild", ATC'20, §4.2) |
//! | [`Shared`] | ours: as its idle times make cheapest, where memory costs by the *share* and a cold start as much as a private copy in the fixed time |
//!
//! Keeping an instance is a ski-rental problem: to keep for as long as keeping has cost what a cold
//! start costs is at most twice as dear as knowing the future. When tensors are shared, what one
//! instance costs is its private memory and its part of each tensor it has in common with others,
//! as PSS counts it. That is less than a copy, so it may stay longer; and since the parts of all
//! sharers add up to the whole, no byte is kept that nobody pays for.
//!
//! Policies are pure. [`replay`] runs one over a trace of calls and counts memory and cold starts.

mod replay;
mod trace;

use std::time::Duration;

use carlsbad_types::ByteSize;

pub use self::replay::{Outcome, replay};
pub use self::trace::{Trace, TracedFunction};

/// What clouds are known to use, between 10 and 20 minutes ("Serverless in the Wild", §2).
pub const CLOUD: Duration = Duration::from_secs(15 * 60);

/// What happens after a call: unloaded at once and loaded again after `prewarm`, or kept loaded
/// where that is zero; unloaded `keep_alive` after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// From the end of a call to the load for the next one; zero keeps it loaded.
    pub prewarm: Duration,
    /// From then on, how long it stays.
    pub keep_alive: Duration,
}

impl Windows {
    const fn keep(keep_alive: Duration) -> Self {
        Self {
            prewarm: Duration::ZERO,
            keep_alive,
        }
    }
}

/// What an instance takes at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Its private memory and its tensors, as if it shared nothing.
    pub whole: ByteSize,
    /// Its private memory and its part of each tensor: size over number of users.
    pub share: ByteSize,
}

/// A keep-alive policy. Functions are numbered by the caller.
pub trait KeepAlive {
    /// A call of `function` has ended; the one before ended `idle` before this one began.
    fn after_call(
        &mut self,
        function: usize,
        idle: Option<Duration>,
        footprint: Footprint,
    ) -> Windows;

    /// The instance was kept for `kept` since it was last asked about, and its time is up: for how
    /// much longer?
    fn at_end(
        &mut self,
        _function: usize,
        _kept: Duration,
        _footprint: Footprint,
    ) -> Option<Duration> {
        None
    }
}

/// Every instance stays for the same time after its last call.
#[derive(Debug, Clone, Copy)]
pub struct Fixed(pub Duration);

impl KeepAlive for Fixed {
    fn after_call(&mut self, _: usize, _: Option<Duration>, _: Footprint) -> Windows {
        Windows::keep(self.0)
    }
}

/// Idle times are counted by the minute, up to four hours, as in ATC'20 §4.2.
const BIN: Duration = Duration::from_secs(60);
const BINS: usize = 240;
/// Load before all but 5% of idle times have passed, unload after 99% have.
const HEAD: f64 = 0.05;
const TAIL: f64 = 0.99;
/// 10% earlier and later than the histogram says.
const MARGIN: f64 = 0.1;
/// A histogram is trusted where its bin counts vary enough: coefficient of variation of 2.
const REPRESENTATIVE_CV: f64 = 2.0;
/// And where at most half of the idle times were beyond its range.
const MOST_OUT_OF_BOUNDS: f64 = 0.5;

/// The hybrid histogram policy of "Serverless in the Wild" (ATC'20, §4.2) without its third part:
/// where most idle times are beyond four hours, that forecasts by ARIMA; here the standard
/// keep-alive is used then, as it is for histograms that say nothing.
#[derive(Debug, Clone)]
pub struct Histogram {
    standard: Duration,
    functions: Vec<IdleTimes>,
}

#[derive(Debug, Clone)]
struct IdleTimes {
    counts: Vec<u32>,
    within: u32,
    beyond: u32,
}

impl Default for IdleTimes {
    fn default() -> Self {
        Self {
            counts: vec![0; BINS],
            within: 0,
            beyond: 0,
        }
    }
}

impl IdleTimes {
    fn record(&mut self, idle: Duration) {
        let bin = (idle.as_secs() / BIN.as_secs()) as usize;
        match self.counts.get_mut(bin) {
            Some(count) => {
                *count += 1;
                self.within += 1;
            }
            None => self.beyond += 1,
        }
    }

    /// The first bin by which a part `q` of the idle times within range is reached.
    fn quantile(&self, q: f64) -> usize {
        let wanted = (q * f64::from(self.within)).ceil().max(1.0);
        let mut sum = 0.0;
        self.counts
            .iter()
            .position(|&count| {
                sum += f64::from(count);
                sum >= wanted
            })
            .unwrap_or(BINS - 1)
    }

    /// Where they say something: from when to when the next call is to be expected.
    fn windows(&self) -> Option<Windows> {
        let all = f64::from(self.within + self.beyond);
        if self.within == 0 || f64::from(self.beyond) > MOST_OUT_OF_BOUNDS * all {
            return None;
        }
        let mean = f64::from(self.within) / BINS as f64;
        let squares: f64 = self
            .counts
            .iter()
            .map(|&n| (f64::from(n) - mean).powi(2))
            .sum();
        if (squares / BINS as f64).sqrt() / mean < REPRESENTATIVE_CV {
            return None;
        }
        // The lower edge of the head's bin and the upper one of the tail's.
        let head = BIN.mul_f64(self.quantile(HEAD) as f64 * (1.0 - MARGIN));
        let tail = BIN.mul_f64((self.quantile(TAIL) + 1) as f64 * (1.0 + MARGIN));
        Some(Windows {
            prewarm: head,
            keep_alive: tail.saturating_sub(head),
        })
    }
}

impl Histogram {
    /// With a standard keep-alive for functions whose histogram says nothing. ATC'20 takes the
    /// range of the histogram, four hours, and so values cold starts above memory.
    pub fn new(standard: Duration) -> Self {
        Self {
            standard,
            functions: Vec::new(),
        }
    }

    fn learn(&mut self, function: usize, idle: Option<Duration>) -> Option<Windows> {
        if self.functions.len() <= function {
            self.functions.resize_with(function + 1, IdleTimes::default);
        }
        let times = &mut self.functions[function];
        if let Some(idle) = idle {
            times.record(idle);
        }
        times.windows()
    }
}

impl KeepAlive for Histogram {
    fn after_call(&mut self, function: usize, idle: Option<Duration>, _: Footprint) -> Windows {
        self.learn(function, idle)
            .unwrap_or(Windows::keep(self.standard))
    }
}

/// Idle times a function must have shown before they are taken for its distribution.
const ENOUGH: u32 = 8;

/// Ours: weighs the rent of an instance, its share of memory over time, against cold starts, each
/// worth a private copy for a given time.
///
/// Of a function whose idle times are known it takes the windows that would have cost least over
/// them. Of another it keeps the instance until the rent paid since the last call is worth a cold
/// start: then the total is at most twice the least possible, whenever the next call comes.
#[derive(Debug, Clone)]
pub struct Shared {
    worth: Duration,
    /// By function.
    known: Vec<Known>,
}

#[derive(Debug, Clone, Default)]
struct Known {
    times: IdleTimes,
    /// The windows that cost least, and with how many idle times and what share that was found.
    best: Option<(Windows, u32, f64)>,
    /// Byte-seconds paid since the last call.
    paid: f64,
    /// Its share when it was last looked at, in bytes.
    share: f64,
}

impl Shared {
    /// A cold start is worth a private copy for that long. [`CLOUD`] makes it as patient as clouds
    /// are with what shares nothing.
    pub const fn new(worth: Duration) -> Self {
        Self {
            worth,
            known: Vec::new(),
        }
    }

    /// How much longer the budget lasts at the present share, at most for the worth itself, after
    /// which the share is looked at anew.
    fn affordable(&self, known: &Known, footprint: Footprint) -> Duration {
        let budget = self.worth.as_secs_f64() * footprint.whole.get() as f64;
        let left = (budget - known.paid) / known.share.max(1.0);
        Duration::try_from_secs_f64(left.max(0.0)).map_or(self.worth, |time| time.min(self.worth))
    }
}

impl Known {
    /// The windows of least cost over the idle times seen. Found anew when those, or the share,
    /// have changed by an eighth.
    fn least_cost(&mut self, worth: Duration, footprint: Footprint) -> Option<Windows> {
        let seen = self.times.within + self.times.beyond;
        if seen < ENOUGH {
            return None;
        }
        let ratio = footprint.share.ratio_of(footprint.whole).max(1e-6);
        if let Some((windows, of, at)) = self.best
            && seen - of <= of / 8
            && (ratio / at - 1.0).abs() <= 0.125
        {
            return Some(windows);
        }
        // In units of a minute's rent.
        let cold = worth.as_secs_f64() / BIN.as_secs_f64() / ratio;
        let windows = self.times.least_cost(cold);
        self.best = Some((windows, seen, ratio));
        Some(windows)
    }
}

impl IdleTimes {
    /// The windows that would have cost least over these idle times, where a minute loaded costs 1
    /// and a cold start `cold`. Each idle time counts as lasting to the end of its bin.
    fn least_cost(&self, cold: f64) -> Windows {
        // Up to and without bin i: idle times, and their sum in minutes.
        let (mut count, mut sum) = (vec![0.0; BINS + 1], vec![0.0; BINS + 1]);
        for (i, &n) in self.counts.iter().enumerate() {
            count[i + 1] = count[i] + f64::from(n);
            sum[i + 1] = sum[i] + f64::from(n) * (i + 1) as f64;
        }
        let all = count[BINS] + f64::from(self.beyond);
        let mut best = (all * cold, Windows::keep(Duration::ZERO));
        for from in 0..BINS {
            if from > 0 && self.counts[from] == 0 {
                continue;
            }
            for to in from..BINS {
                if self.counts[to] == 0 {
                    continue;
                }
                let hit = count[to + 1] - count[from];
                let after = all - count[to + 1];
                let rent =
                    sum[to + 1] - sum[from] - hit * from as f64 + after * (to + 1 - from) as f64;
                let cost = (all - hit) * cold + rent;
                if cost < best.0 {
                    let windows = Windows {
                        prewarm: BIN * from as u32,
                        keep_alive: BIN * (to + 1 - from) as u32,
                    };
                    best = (cost, windows);
                }
            }
        }
        best.1
    }
}

impl KeepAlive for Shared {
    fn after_call(
        &mut self,
        function: usize,
        idle: Option<Duration>,
        footprint: Footprint,
    ) -> Windows {
        if self.known.len() <= function {
            self.known.resize_with(function + 1, Known::default);
        }
        let known = &mut self.known[function];
        if let Some(idle) = idle {
            known.times.record(idle);
        }
        known.paid = 0.0;
        known.share = footprint.share.get() as f64;
        if let Some(windows) = known.least_cost(self.worth, footprint) {
            return windows;
        }
        Windows::keep(self.affordable(&self.known[function], footprint))
    }

    fn at_end(
        &mut self,
        function: usize,
        kept: Duration,
        footprint: Footprint,
    ) -> Option<Duration> {
        let share = footprint.share.get() as f64;
        let known = self.known.get_mut(function)?;
        if known.best.is_some() {
            return None;
        }
        // Others came and went meanwhile: about the mean of then and now.
        known.paid += kept.as_secs_f64() * (known.share + share) / 2.0;
        known.share = share;
        let longer = self.affordable(&self.known[function], footprint);
        // Under a second is what rounding leaves of a budget that is used up.
        (longer >= Duration::from_secs(1)).then_some(longer)
    }
}

#[cfg(test)]
mod tests;
