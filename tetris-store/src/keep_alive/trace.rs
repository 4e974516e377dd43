//! Calls over time, and the shape of a public trace.

use std::time::Duration;

use carlsbad_types::ByteSize;

/// A function in a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TracedFunction {
    /// Memory of one instance beside its tensors.
    pub private: ByteSize,
    /// Its tensors, by a number that equals where the bytes do, with their sizes.
    pub tensors: Vec<(u32, ByteSize)>,
}

/// Which function was called when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The functions, by number.
    pub functions: Vec<TracedFunction>,
    /// Calls: time since the trace began, and the function's number. In the order of time.
    pub calls: Vec<(Duration, usize)>,
    /// How long the trace is.
    pub length: Duration,
}

/// SplitMix64 (Steele, Lea, Flood, OOPSLA'14).
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform from 0 up to 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Exponential with mean 1.
    fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }
}

impl Trace {
    /// A synthetic trace, drawn from `seed`, with the marginals that "Serverless in the Wild"
    /// (ATC'20, §3) reports for Azure Functions: 45% of applications are called at most once an
    /// hour and 81% at most once a minute on average (figure 5); a fifth are regular, as timers
    /// make them, and two fifths more irregular than Poisson (figure 6). It is not that trace.
    ///
    /// The functions belong to families of eight: 80% of a function's tensor bytes are those of the
    /// family's frozen base, the rest its own.
    pub fn shaped_like_azure(seed: u64, functions: usize, length: Duration) -> Self {
        let mut random = SplitMix(seed);
        let mut calls = Vec::new();
        let mut made = Vec::with_capacity(functions);
        for function in 0..functions {
            let family = (function / 8) as u32;
            let whole = ByteSize::mib(100 + u64::from(family) * 97 % 400);
            let base = ByteSize::new(whole.get() / 5 * 4);
            made.push(TracedFunction {
                private: ByteSize::mib(40),
                tensors: vec![
                    (family, base),
                    (1_000_000 + function as u32, whole.saturating_sub(base)),
                ],
            });
            let mean = mean_gap(random.unit());
            let kind = random.unit();
            let mut at = random.unit() * mean;
            while at < length.as_secs_f64() {
                calls.push((Duration::from_secs_f64(at), function));
                at += match kind {
                    // A timer, with some seconds of jitter.
                    k if k < 0.2 => mean + random.unit() * 2.0,
                    k if k < 0.6 => mean * random.exponential(),
                    // Bursts: nine gaps in ten are short (hyperexponential, CV about 3).
                    _ if random.unit() < 0.9 => mean * 0.1 * random.exponential(),
                    _ => mean * 9.1 * random.exponential(),
                };
            }
        }
        calls.sort_unstable();
        Self {
            functions: made,
            calls,
            length,
        }
    }
}

/// Mean seconds between calls at a quantile of the population: log-linear between the points that
/// figure 5 of ATC'20 names (a day, an hour, a minute) down to a second.
fn mean_gap(quantile: f64) -> f64 {
    const POINTS: [(f64, f64); 4] = [(0.0, 86_400.0), (0.45, 3_600.0), (0.81, 60.0), (1.0, 1.0)];
    let above = POINTS
        .iter()
        .position(|(q, _)| *q > quantile)
        .unwrap_or(3)
        .max(1);
    let ((q0, gap0), (q1, gap1)) = (POINTS[above - 1], POINTS[above]);
    let part = (quantile - q0) / (q1 - q0);
    gap0 * f64::powf(gap1 / gap0, part)
}
