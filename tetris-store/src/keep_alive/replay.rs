//! A policy over a trace: how much memory for how long, and how many cold starts.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;

use carlsbad_types::ByteSize;

use super::{Footprint, KeepAlive, Trace};

/// What a policy did with a trace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Calls in all.
    pub calls: u64,
    /// Calls that found no loaded instance.
    pub cold_starts: u64,
    /// Memory held, summed up over time, in byte-seconds.
    pub byte_seconds: f64,
    /// Bytes loaded: tensors nobody held, and private memory.
    pub loaded: ByteSize,
}

impl Outcome {
    /// Memory held on average over `length`.
    pub fn mean_memory(&self, length: Duration) -> ByteSize {
        ByteSize::new((self.byte_seconds / length.as_secs_f64().max(1e-9)) as u64)
    }
}

/// What is to happen to an instance, unless a call comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Load { keep_alive: Duration },
    End { kept: Duration },
}

struct Machine<'a> {
    trace: &'a Trace,
    /// Whether equal tensors are held once.
    sharing: bool,
    loaded: Vec<bool>,
    users: HashMap<u32, u32>,
    held: ByteSize,
    now: Duration,
    outcome: Outcome,
}

impl Machine<'_> {
    fn advance(&mut self, to: Duration) {
        let span = to.saturating_sub(self.now).as_secs_f64();
        self.outcome.byte_seconds += span * self.held.get() as f64;
        self.now = to;
    }

    fn load(&mut self, function: usize) {
        if std::mem::replace(&mut self.loaded[function], true) {
            return;
        }
        let own = &self.trace.functions[function];
        let mut new = own.private;
        for (tensor, size) in &own.tensors {
            let users = self.users.entry(*tensor).or_default();
            *users += 1;
            if *users == 1 || !self.sharing {
                new += *size;
            }
        }
        self.held += new;
        self.outcome.loaded += new;
    }

    fn unload(&mut self, function: usize) {
        if !std::mem::replace(&mut self.loaded[function], false) {
            return;
        }
        let own = &self.trace.functions[function];
        let mut freed = own.private;
        for (tensor, size) in &own.tensors {
            let users = self.users.entry(*tensor).or_default();
            *users -= 1;
            if *users == 0 || !self.sharing {
                freed += *size;
            }
        }
        self.held = self.held.saturating_sub(freed);
    }

    fn footprint(&self, function: usize) -> Footprint {
        let own = &self.trace.functions[function];
        let (mut whole, mut share) = (own.private, own.private);
        for (tensor, size) in &own.tensors {
            whole += *size;
            let users = if self.sharing {
                self.users.get(tensor).copied().unwrap_or(0).max(1)
            } else {
                1
            };
            share += ByteSize::new(size.get() / u64::from(users));
        }
        Footprint { whole, share }
    }
}

/// Runs `policy` over `trace`. A call takes no time; a function has one instance, which serves all
/// its calls (runtime sharing sees to that). With `sharing` equal tensors are held once.
///
/// Calls of functions that the trace does not declare are passed over.
pub fn replay(trace: &Trace, policy: &mut dyn KeepAlive, sharing: bool) -> Outcome {
    let functions = trace.functions.len();
    let mut machine = Machine {
        trace,
        sharing,
        loaded: vec![false; functions],
        users: HashMap::new(),
        held: ByteSize::ZERO,
        now: Duration::ZERO,
        outcome: Outcome {
            calls: 0,
            cold_starts: 0,
            byte_seconds: 0.0,
            loaded: ByteSize::ZERO,
        },
    };
    let mut last_call = vec![None; functions];
    // A call makes the timers set before it void: they carry the number of calls at their setting.
    let mut calls_of = vec![0u64; functions];
    let mut timers = BinaryHeap::new();
    let calls = trace.calls.iter().filter(|(_, f)| *f < functions);
    for event in calls.map(Some).chain([None]) {
        let until = event.map_or(trace.length, |(at, _)| *at);
        while let Some(&Reverse((at, function, set_at, timer))) = timers.peek() {
            // What ends just when a call comes is still there for it.
            if at >= until {
                break;
            }
            timers.pop();
            if set_at != calls_of[function] {
                continue;
            }
            machine.advance(at);
            match timer {
                Timer::Load { keep_alive } => {
                    machine.load(function);
                    let end = Timer::End { kept: keep_alive };
                    timers.push(Reverse((at + keep_alive, function, set_at, end)));
                }
                Timer::End { kept } => {
                    match policy.at_end(function, kept, machine.footprint(function)) {
                        Some(longer) => {
                            let end = Timer::End { kept: longer };
                            timers.push(Reverse((at + longer, function, set_at, end)));
                        }
                        None => machine.unload(function),
                    }
                }
            }
        }
        machine.advance(until);
        let Some(&(at, function)) = event else { break };
        machine.outcome.calls += 1;
        if !machine.loaded[function] {
            machine.outcome.cold_starts += 1;
        }
        machine.load(function);
        calls_of[function] += 1;
        let idle = last_call[function].replace(at).map(|before| at - before);
        let windows = policy.after_call(function, idle, machine.footprint(function));
        let (when, timer) = if windows.prewarm.is_zero() {
            let kept = windows.keep_alive;
            (at + kept, Timer::End { kept })
        } else {
            machine.unload(function);
            let keep_alive = windows.keep_alive;
            (at + windows.prewarm, Timer::Load { keep_alive })
        };
        timers.push(Reverse((when, function, calls_of[function], timer)));
    }
    machine.outcome
}
