//! When a batch is due, and who is in it. Pure: the caller says what time it is.

use std::collections::BTreeMap;
use std::time::Duration;

use super::profile::ProfileRow;

/// Time since the instance was started.
pub(crate) type Tick = Duration;

/// A bounded queue that forms batches.
///
/// A batch is due when it is full, or when a request in it may wait no longer: its own batch
/// timeout (SLO - L) is over, or an earlier deadline of its own would be missed. Who is due first
/// goes first; among requests with equal deadlines that is first come, first served.
#[derive(Debug)]
pub(crate) struct Batcher<T> {
    size: usize,
    latency: Duration,
    timeout: Duration,
    limit: usize,
    /// By the moment a request must start, then by arrival.
    queue: BTreeMap<(Tick, u64), Waiting<T>>,
    arrivals: u64,
    closing: bool,
}

#[derive(Debug)]
struct Waiting<T> {
    item: T,
    deadline: Tick,
}

/// What is to be done now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next<T> {
    /// These cannot be answered in time any more: say so.
    Expired(Vec<T>),
    /// These run now, in one batch.
    Batch(Vec<T>),
    /// Nothing before then, unless a request comes.
    WaitUntil(Tick),
    /// Nothing unless a request comes.
    Idle,
    /// Nothing any more.
    Closed,
}

impl<T> Batcher<T> {
    /// Batches for an instance configured as `row` under `slo`, of at most `limit` waiting requests.
    pub(crate) fn new(row: &ProfileRow, slo: Duration, limit: usize) -> Self {
        Self {
            size: row.batch as usize,
            latency: row.latency,
            timeout: row.batch_timeout(slo),
            limit,
            queue: BTreeMap::new(),
            arrivals: 0,
            closing: false,
        }
    }

    /// Takes in a request that came at `now`; gives it back where the queue is full or closing.
    pub(crate) fn push(&mut self, item: T, now: Tick, deadline: Tick) -> Result<(), T> {
        if self.closing || self.queue.len() >= self.limit {
            return Err(item);
        }
        let latest_start = deadline.saturating_sub(self.latency);
        let due = (now + self.timeout).min(latest_start);
        self.queue
            .insert((due, self.arrivals), Waiting { item, deadline });
        self.arrivals += 1;
        Ok(())
    }

    /// No more requests come in; those that wait are due at once.
    pub(crate) fn close(&mut self) {
        self.closing = true;
    }

    /// What is to be done at `now`.
    pub(crate) fn next(&mut self, now: Tick) -> Next<T> {
        // A deadline is never before its request is due, so the expired are among the overdue.
        let expired: Vec<_> = self
            .queue
            .range(..=(now, u64::MAX))
            .filter(|(_, waiting)| waiting.deadline <= now)
            .map(|(key, _)| *key)
            .collect();
        if !expired.is_empty() {
            return Next::Expired(self.take(expired));
        }
        let Some((&(due, _), _)) = self.queue.first_key_value() else {
            return if self.closing {
                Next::Closed
            } else {
                Next::Idle
            };
        };
        if self.queue.len() >= self.size || due <= now || self.closing {
            let first = self.queue.keys().copied().take(self.size).collect();
            Next::Batch(self.take(first))
        } else {
            Next::WaitUntil(due)
        }
    }

    fn take(&mut self, keys: Vec<(Tick, u64)>) -> Vec<T> {
        keys.iter()
            .filter_map(|key| self.queue.remove(key))
            .map(|waiting| waiting.item)
            .collect()
    }

    /// Requests that wait.
    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }
}

#[cfg(test)]
mod tests {
    use carlsbad_types::ByteSize;
    use proptest::prelude::*;

    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn row(batch: u32, concurrency: u32, latency: Duration) -> ProfileRow {
        ProfileRow {
            cpus: 1.0,
            gpu_share: 0.0,
            memory: ByteSize::ZERO,
            batch,
            concurrency,
            latency,
        }
    }

    #[test]
    fn a_full_batch_starts_at_once_and_a_part_of_one_at_its_timeout() {
        let slo = ms(100);
        let mut batcher = Batcher::new(&row(2, 1, ms(30)), slo, 8);
        assert_eq!(batcher.next(ms(0)), Next::<char>::Idle);
        batcher.push('a', ms(0), slo).unwrap();
        assert_eq!(batcher.next(ms(5)), Next::WaitUntil(ms(70)));
        batcher.push('b', ms(10), ms(110)).unwrap();
        batcher.push('c', ms(12), ms(112)).unwrap();
        assert_eq!(batcher.next(ms(12)), Next::Batch(vec!['a', 'b']));
        assert_eq!(batcher.next(ms(12)), Next::WaitUntil(ms(82)));
        assert_eq!(batcher.next(ms(82)), Next::Batch(vec!['c']));
    }

    #[test]
    fn an_urgent_request_goes_first_and_does_not_wait_for_company() {
        let mut batcher = Batcher::new(&row(2, 1, ms(30)), ms(100), 8);
        batcher.push('a', ms(0), ms(100)).unwrap();
        batcher.push('b', ms(1), ms(40)).unwrap();
        batcher.push('c', ms(2), ms(102)).unwrap();
        assert_eq!(batcher.next(ms(2)), Next::Batch(vec!['b', 'a']));
    }

    #[test]
    fn without_batching_nobody_waits() {
        let mut batcher = Batcher::new(&row(1, 1, ms(30)), ms(100), 8);
        batcher.push('a', ms(3), ms(103)).unwrap();
        assert_eq!(batcher.next(ms(3)), Next::Batch(vec!['a']));
    }

    #[test]
    fn what_is_too_late_is_said_to_be_rather_than_run() {
        let mut batcher = Batcher::new(&row(4, 1, ms(30)), ms(100), 8);
        batcher.push('a', ms(0), ms(20)).unwrap();
        batcher.push('b', ms(0), ms(100)).unwrap();
        assert_eq!(batcher.next(ms(50)), Next::Expired(vec!['a']));
        assert_eq!(batcher.next(ms(50)), Next::WaitUntil(ms(70)));
    }

    proptest! {
        /// A simulated instance: Poisson-like arrivals, `c` workers that each take `latency`.
        #[test]
        fn every_request_ends_once_in_batches_of_at_most_b_and_in_time_below_rps_max(
            batch in 1u32..9,
            concurrency in 1u32..4,
            latency in 5u64..50,
            slack in 0u64..200,
            gaps in prop::collection::vec(0u64..60, 1..200),
        ) {
            let slo = ms(latency * if batch > 1 { 2 } else { 1 } + slack);
            let row = row(batch, concurrency, ms(latency));
            let limit = gaps.len();
            let mut batcher = Batcher::new(&row, slo, limit);
            let mut workers = vec![Duration::ZERO; concurrency as usize];
            let mut arrivals = Vec::new();
            let mut at = 0;
            for gap in &gaps {
                at += gap;
                arrivals.push(ms(at));
            }
            // In a window of one latency there are no more than one round of batches can take.
            let capacity = (batch * concurrency) as usize;
            let calm = arrivals.iter().all(|from| {
                let window = *from..*from + ms(latency) * 2;
                arrivals.iter().filter(|a| window.contains(a)).count() <= capacity
            });

            let mut finished = vec![None; arrivals.len()];
            let mut coming = arrivals.iter().copied().enumerate().peekable();
            let mut now = Duration::ZERO;
            loop {
                while let Some((id, at)) = coming.next_if(|(_, at)| *at <= now) {
                    prop_assert!(batcher.push(id, at, at + slo).is_ok());
                }
                if coming.peek().is_none() {
                    batcher.close();
                }
                let free = workers.iter_mut().find(|until| **until <= now);
                let mut wake = coming.peek().map(|(_, at)| *at);
                if let Some(worker) = free {
                    match batcher.next(now) {
                        Next::Batch(ids) => {
                            prop_assert!(!ids.is_empty() && ids.len() <= batch as usize);
                            *worker = now + ms(latency);
                            for id in ids {
                                prop_assert!(finished[id].replace(Some(*worker)).is_none());
                            }
                            continue;
                        }
                        Next::Expired(ids) => {
                            for id in ids {
                                prop_assert!(finished[id].replace(None).is_none());
                            }
                            continue;
                        }
                        Next::WaitUntil(due) => {
                            prop_assert!(due > now);
                            wake = Some(wake.map_or(due, |at| at.min(due)));
                        }
                        Next::Idle => {}
                        Next::Closed => break,
                    }
                } else {
                    let first = workers.iter().copied().min().unwrap();
                    wake = Some(wake.map_or(first, |at| at.min(first)));
                }
                now = wake.expect("a world in which nothing can happen");
            }
            prop_assert_eq!(batcher.len(), 0);
            for (id, end) in finished.iter().enumerate() {
                let end = end.expect("a request was lost");
                if calm {
                    let end = end.expect("expired though there was room");
                    prop_assert!(end <= arrivals[id] + slo, "late: {end:?} {:?}", arrivals[id]);
                }
            }
        }

        #[test]
        fn the_queue_never_holds_more_than_its_limit(limit in 0usize..20, pushes in 0usize..40) {
            let mut batcher = Batcher::new(&row(64, 1, ms(1)), ms(100), limit);
            let taken = (0..pushes).filter(|&i| batcher.push(i, ms(0), ms(100)).is_ok()).count();
            prop_assert_eq!(taken, pushes.min(limit));
            batcher.close();
            prop_assert!(batcher.push(0, ms(0), ms(100)).is_err());
        }
    }
}
