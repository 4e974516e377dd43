//! Keep-alive policies over a synthetic trace: memory held and cold starts.
//!
//! `cargo run --release -p tetris-store --example keep_alive`
#![allow(
    clippy::print_stdout,
    reason = "an example shows its result to whoever runs it"
)]

use std::time::Duration;

use tetris_store::keep_alive::{CLOUD, Fixed, Histogram, KeepAlive, Shared, Trace, replay};

fn main() {
    let days = 4;
    let length = Duration::from_secs(days * 86_400);
    println!("policy                          tensors   cold starts   of calls   memory held");
    for seed in 1..=3 {
        let trace = Trace::shaped_like_azure(seed, 128, length);
        let policies: [(&str, bool, &mut dyn KeepAlive); 5] = [
            ("fixed 15 min, as clouds", false, &mut Fixed(CLOUD)),
            ("fixed 15 min", true, &mut Fixed(CLOUD)),
            ("fixed 60 min", true, &mut Fixed(CLOUD * 4)),
            ("histogram (ATC'20)", true, &mut Histogram::new(CLOUD)),
            ("shared rent (ours)", true, &mut Shared::new(CLOUD)),
        ];
        println!(
            "seed {seed}, {} functions, {days} days",
            trace.functions.len()
        );
        for (name, sharing, policy) in policies {
            let outcome = replay(&trace, policy, sharing);
            println!(
                "  {name:<28}  {:<8}  {:>11}  {:>9}   {}",
                if sharing { "shared" } else { "private" },
                outcome.cold_starts,
                outcome.calls,
                outcome.mean_memory(trace.length),
            );
        }
    }
}
