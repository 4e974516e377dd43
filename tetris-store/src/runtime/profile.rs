//! What one instance can do, by how it is configured: the profile table and the choice of a row.

use std::time::Duration;

use carlsbad_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One measured configuration of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileRow {
    /// CPU cores the instance may use.
    pub cpus: f64,
    /// Share of one GPU that it may use, 0 to 1.
    #[serde(default)]
    pub gpu_share: f64,
    /// Memory of its own, shared tensors not counted.
    pub memory: ByteSize,
    /// Requests in a batch (b).
    pub batch: u32,
    /// Batches at a time (c).
    pub concurrency: u32,
    /// Time to answer one full batch while `concurrency` of them run (L), in seconds where
    /// serialised.
    #[serde(rename = "latency_s", with = "seconds")]
    pub latency: Duration,
}

/// What a CPU core costs, in bytes of memory: the paper's alpha.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CpuPrice(pub ByteSize);

impl Default for CpuPrice {
    /// 1,769 MB: the memory with which AWS Lambda gives one vCPU ("Configure Lambda function
    /// memory", AWS Lambda developer guide).
    fn default() -> Self {
        Self(ByteSize::new(1_769_000_000))
    }
}

impl ProfileRow {
    /// Requests a second that it can serve: 1 / L x c x b.
    pub fn qps(&self) -> f64 {
        f64::from(self.batch) * f64::from(self.concurrency) / self.latency.as_secs_f64()
    }

    /// What it takes, in bytes: cpus x alpha + memory.
    pub fn cost(&self, price: CpuPrice) -> f64 {
        self.cpus * price.0.get() as f64 + self.memory.get() as f64
    }

    /// Whether it answers in time: L <= SLO alone, L <= SLO / 2 where a request may first wait as
    /// long again for its batch to fill.
    pub fn meets(&self, slo: Duration) -> bool {
        if self.batch > 1 {
            self.latency.saturating_mul(2) <= slo
        } else {
            self.latency <= slo
        }
    }

    /// How long the first request of a batch may wait for others: SLO - L; nothing where there is
    /// nobody to wait for.
    pub fn batch_timeout(&self, slo: Duration) -> Duration {
        if self.batch > 1 {
            slo.saturating_sub(self.latency)
        } else {
            Duration::ZERO
        }
    }

    /// The load it is given at most, in requests a second: floor(1 / L x b x c), and where that is
    /// zero (a latency over a second) the fraction itself, or no number of instances would do.
    pub fn rps_max(&self) -> f64 {
        let whole = self.qps().floor();
        if whole >= 1.0 { whole } else { self.qps() }
    }

    /// The load below which its batches do not fill before their timeout: floor(1 / (SLO - L) x b
    /// x c). Zero without batching, and also where every load fills a batch in time.
    pub fn rps_min(&self, slo: Duration) -> f64 {
        if self.batch <= 1 {
            return 0.0;
        }
        let wait = self.batch_timeout(slo).as_secs_f64();
        (f64::from(self.batch) * f64::from(self.concurrency) / wait).floor()
    }

    fn defect(&self) -> Option<&'static str> {
        let share = 0.0..=1.0;
        if !(self.cpus.is_finite() && self.cpus >= 0.0) {
            Some("`cpus` is no number from 0 on")
        } else if !share.contains(&self.gpu_share) {
            Some("`gpu_share` is not between 0 and 1")
        } else if self.batch == 0 || self.concurrency == 0 {
            Some("`batch` and `concurrency` are at least 1")
        } else if self.latency.is_zero() {
            Some("`latency` is more than nothing")
        } else {
            None
        }
    }
}

/// The profile of one function: its measured configurations, at least one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<ProfileRow>", into = "Vec<ProfileRow>")]
pub struct Profile(Vec<ProfileRow>);

impl Profile {
    /// A table of `rows`.
    ///
    /// # Errors
    /// [`Error::BadProfile`] where there is no row, or one has a value that cannot be.
    pub fn new(rows: Vec<ProfileRow>) -> Result<Self> {
        if rows.is_empty() {
            return Err(Error::BadProfile {
                row: 0,
                why: "there is no row",
            });
        }
        match rows
            .iter()
            .map(ProfileRow::defect)
            .enumerate()
            .find_map(|(row, why)| Some((row, why?)))
        {
            Some((row, why)) => Err(Error::BadProfile { row, why }),
            None => Ok(Self(rows)),
        }
    }

    /// Its rows, as given.
    pub fn rows(&self) -> &[ProfileRow] {
        &self.0
    }

    /// The rows that answer within `slo` at a load of `rps`, those first for which one served
    /// request costs least. A row whose batches would not fill in time at that load is left out,
    /// unless it would be alone.
    pub fn by_cost(&self, slo: Duration, price: CpuPrice, rps: f64) -> Vec<ProfileRow> {
        let mut rows: Vec<_> = self
            .0
            .iter()
            .copied()
            .filter(|row| row.meets(slo))
            .collect();
        if rows.iter().any(|row| row.rps_min(slo) <= rps) {
            rows.retain(|row| row.rps_min(slo) <= rps);
        }
        let per_request = |row: &ProfileRow| row.cost(price) / row.rps_max().min(rps);
        rows.sort_by(|a, b| {
            per_request(a)
                .total_cmp(&per_request(b))
                // Of two as cheap, the faster.
                .then(a.latency.cmp(&b.latency))
        });
        rows
    }

    /// The cheapest row for a load that keeps any of them busy: least (cpus alpha + memory) / qps
    /// among those that answer within `slo`.
    ///
    /// # Errors
    /// [`Error::SloUnreachable`] with the least SLO that would do.
    pub fn cheapest(&self, slo: Duration, price: CpuPrice) -> Result<ProfileRow> {
        self.by_cost(slo, price, f64::INFINITY)
            .first()
            .copied()
            .ok_or_else(|| Error::SloUnreachable {
                slo,
                least: self.least_slo(),
            })
    }

    /// The shortest SLO that any row meets.
    pub fn least_slo(&self) -> Duration {
        self.0
            .iter()
            .map(|row| row.latency * if row.batch > 1 { 2 } else { 1 })
            .min()
            .unwrap_or(Duration::MAX)
    }
}

impl TryFrom<Vec<ProfileRow>> for Profile {
    type Error = Error;
    fn try_from(rows: Vec<ProfileRow>) -> Result<Self> {
        Self::new(rows)
    }
}

impl From<Profile> for Vec<ProfileRow> {
    fn from(profile: Profile) -> Self {
        profile.0
    }
}

/// Durations as a number of seconds, which is what people write into JSON.
pub(crate) mod seconds {
    use std::time::Duration;

    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(time.as_secs_f64())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        Duration::try_from_secs_f64(f64::deserialize(from)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PRICE: CpuPrice = CpuPrice(ByteSize::gib(1));

    fn row(cpus: f64, batch: u32, concurrency: u32, millis: u64) -> ProfileRow {
        ProfileRow {
            cpus,
            gpu_share: 0.0,
            memory: ByteSize::mib(100),
            batch,
            concurrency,
            latency: Duration::from_millis(millis),
        }
    }

    #[test]
    fn the_formulas_are_the_papers() {
        let slo = Duration::from_millis(200);
        let row = row(2.0, 8, 2, 60);
        assert!((row.qps() - 1000.0 / 60.0 * 2.0 * 8.0).abs() < 1e-9);
        assert_eq!(row.rps_max(), (1000.0f64 / 60.0 * 16.0).floor());
        assert_eq!(row.rps_min(slo), (1000.0f64 / 140.0 * 16.0).floor());
        assert_eq!(row.batch_timeout(slo), Duration::from_millis(140));
        let gib = (1u64 << 30) as f64;
        assert_eq!(row.cost(PRICE), 2.0 * gib + gib / 10.24);
    }

    #[test]
    fn a_batch_must_leave_half_the_slo_for_waiting() {
        let slo = Duration::from_millis(100);
        assert!(row(1.0, 1, 1, 100).meets(slo));
        assert!(!row(1.0, 2, 1, 51).meets(slo));
        assert!(row(1.0, 2, 1, 50).meets(slo));
    }

    #[test]
    fn batching_is_chosen_only_for_a_load_that_fills_it() {
        let slo = Duration::from_millis(200);
        let single = row(1.0, 1, 1, 50);
        let batched = row(1.0, 16, 1, 100);
        let profile = Profile::new(vec![single, batched]).unwrap();
        assert_eq!(profile.cheapest(slo, PRICE).unwrap(), batched);
        assert_eq!(profile.by_cost(slo, PRICE, 5.0), [single]);
    }

    #[test]
    fn an_slo_nobody_meets_says_which_one_would_be() {
        let profile = Profile::new(vec![row(1.0, 1, 1, 80), row(1.0, 4, 1, 30)]).unwrap();
        let refused = profile
            .cheapest(Duration::from_millis(50), PRICE)
            .unwrap_err();
        assert!(
            matches!(refused, Error::SloUnreachable { least, .. } if least.as_millis() == 60),
            "{refused}"
        );
    }

    #[test]
    fn impossible_rows_are_refused() {
        let good = row(1.0, 1, 1, 1);
        let bad = [
            ProfileRow {
                cpus: f64::NAN,
                ..good
            },
            ProfileRow { cpus: -1.0, ..good },
            ProfileRow {
                gpu_share: 1.5,
                ..good
            },
            ProfileRow { batch: 0, ..good },
            ProfileRow {
                concurrency: 0,
                ..good
            },
            ProfileRow {
                latency: Duration::ZERO,
                ..good
            },
        ];
        for row in bad {
            let refused = Profile::new(vec![good, row]).unwrap_err();
            assert!(
                matches!(refused, Error::BadProfile { row: 1, .. }),
                "{refused}"
            );
        }
        assert!(Profile::new(vec![]).is_err());
    }

    proptest! {
        #[test]
        fn the_choice_is_the_least_cost_per_request_of_those_in_time(
            rows in prop::collection::vec((1u32..5, 1u32..17, 1u32..5, 1u64..200), 1..20),
            slo in 1u64..400,
        ) {
            let slo = Duration::from_millis(slo);
            let rows: Vec<_> = rows.into_iter().map(|(cpus, b, c, l)| row(cpus.into(), b, c, l)).collect();
            let in_time = rows.iter().filter(|row| row.meets(slo));
            let best = in_time.map(|row| row.cost(PRICE) / row.rps_max()).min_by(f64::total_cmp);
            let chosen = Profile::new(rows.clone()).unwrap().cheapest(slo, PRICE);
            prop_assert_eq!(chosen.ok().map(|row| row.cost(PRICE) / row.rps_max()), best);
        }
    }
}
