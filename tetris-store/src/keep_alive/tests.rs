use proptest::prelude::*;

use super::*;

const MIB: f64 = (1u64 << 20) as f64;

fn seconds(s: u64) -> Duration {
    Duration::from_secs(s)
}

fn trace_of(functions: usize, calls: &[(u64, usize)], length: u64) -> Trace {
    Trace {
        functions: (0..functions)
            .map(|f| TracedFunction {
                private: ByteSize::mib(1),
                tensors: vec![(0, ByteSize::mib(8)), (1 + f as u32, ByteSize::mib(1))],
            })
            .collect(),
        calls: calls.iter().map(|(at, f)| (seconds(*at), *f)).collect(),
        length: seconds(length),
    }
}

#[test]
fn a_fixed_time_holds_for_that_time_after_the_last_call() {
    let trace = trace_of(1, &[(0, 0), (50, 0), (200, 0)], 1_000);
    let outcome = replay(&trace, &mut Fixed(seconds(60)), true);
    assert_eq!((outcome.calls, outcome.cold_starts), (3, 2));
    // Held from 0 to 110 and from 200 to 260.
    assert!((outcome.byte_seconds / MIB - 10.0 * 170.0).abs() < 1e-6);
    assert_eq!(outcome.loaded, ByteSize::mib(20));
}

#[test]
fn equal_tensors_count_once_when_shared() {
    let trace = trace_of(2, &[(0, 0), (0, 1)], 60);
    let shared = replay(&trace, &mut Fixed(seconds(60)), true);
    let private = replay(&trace, &mut Fixed(seconds(60)), false);
    assert!((shared.byte_seconds / MIB - 12.0 * 60.0).abs() < 1e-6);
    assert!((private.byte_seconds / MIB - 20.0 * 60.0).abs() < 1e-6);
}

#[test]
fn regular_calls_are_loaded_ahead_of_and_held_for_minutes() {
    let calls: Vec<_> = (0..100).map(|i| (i * 3_600, 0)).collect();
    let trace = trace_of(1, &calls, 100 * 3_600);
    let fixed = replay(&trace, &mut Fixed(CLOUD), true);
    let histogram = replay(&trace, &mut Histogram::new(CLOUD), true);
    assert_eq!(fixed.cold_starts, 100);
    assert!(histogram.cold_starts <= 2, "{histogram:?}");
    assert!(histogram.byte_seconds < fixed.byte_seconds, "{histogram:?}");
}

#[test]
fn without_sharers_the_worth_is_a_fixed_time() {
    let mut rent_alone = Shared::new(CLOUD);
    let footprint = Footprint {
        whole: ByteSize::mib(10),
        share: ByteSize::mib(10),
    };
    let windows = rent_alone.after_call(0, None, footprint);
    assert_eq!(windows, Windows::keep(CLOUD));
    assert_eq!(rent_alone.at_end(0, CLOUD, footprint), None);
}

#[test]
fn a_sharer_stays_longer_by_as_much_as_it_shares() {
    let mut policy = Shared::new(CLOUD);
    let quarter = Footprint {
        whole: ByteSize::mib(100),
        share: ByteSize::mib(25),
    };
    let mut kept = policy.after_call(0, None, quarter).keep_alive;
    let mut total = kept;
    while let Some(longer) = policy.at_end(0, kept, quarter) {
        kept = longer;
        total += longer;
    }
    assert_eq!(total, CLOUD * 4);
}

/// Fewer cold starts *and* less memory than the fixed time and the histogram, both sharing.
#[test]
fn on_an_azure_shaped_trace_ours_beats_the_fixed_fifteen_minutes() {
    for seed in [1, 2] {
        let trace = Trace::shaped_like_azure(seed, 96, seconds(2 * 86_400));
        let cloud = replay(&trace, &mut Fixed(CLOUD), false);
        let fixed = replay(&trace, &mut Fixed(CLOUD), true);
        let histogram = replay(&trace, &mut Histogram::new(CLOUD), true);
        let ours = replay(&trace, &mut Shared::new(CLOUD), true);
        assert!(ours.cold_starts < fixed.cold_starts, "{ours:?} {fixed:?}");
        assert!(ours.byte_seconds < fixed.byte_seconds, "{ours:?} {fixed:?}");
        assert!(
            ours.cold_starts < histogram.cold_starts,
            "{ours:?} {histogram:?}"
        );
        assert!(
            ours.byte_seconds < histogram.byte_seconds,
            "{ours:?} {histogram:?}"
        );
        assert!(
            fixed.byte_seconds < 0.6 * cloud.byte_seconds,
            "{fixed:?} {cloud:?}"
        );
    }
}

proptest! {
    #[test]
    fn replay_never_loses_count(
        gaps in prop::collection::vec((0u64..2_000, 0usize..4), 0..80),
        keep in 0u64..3_000,
    ) {
        let mut at = 0;
        let calls: Vec<_> = gaps.into_iter().map(|(gap, f)| { at += gap; (at, f) }).collect();
        let trace = trace_of(4, &calls, at + 10_000);
        let policies: [&mut dyn KeepAlive; 3] = [
            &mut Fixed(seconds(keep)),
            &mut Histogram::new(seconds(keep)),
            &mut Shared::new(seconds(keep)),
        ];
        for policy in policies {
            let outcome = replay(&trace, policy, true);
            prop_assert_eq!(outcome.calls, calls.len() as u64);
            prop_assert!(outcome.cold_starts <= outcome.calls);
            // All there is, all the time, is the most there can be.
            let most = 16.0 * MIB * (at + 10_000) as f64;
            prop_assert!((0.0..=most).contains(&outcome.byte_seconds));
        }
    }

    /// Longer is warmer: a property that a replay with a wrong order of events breaks.
    #[test]
    fn a_longer_fixed_time_has_no_more_cold_starts(
        gaps in prop::collection::vec((0u64..500, 0usize..3), 1..80),
        keep in 0u64..400,
    ) {
        let mut at = 0;
        let calls: Vec<_> = gaps.into_iter().map(|(gap, f)| { at += gap; (at, f) }).collect();
        let trace = trace_of(3, &calls, at + 1);
        let shorter = replay(&trace, &mut Fixed(seconds(keep)), true);
        let longer = replay(&trace, &mut Fixed(seconds(keep + 50)), true);
        prop_assert!(longer.cold_starts <= shorter.cold_starts);
        prop_assert!(longer.byte_seconds >= shorter.byte_seconds);
    }
}
