//! Figures 1 to 1e: how fast clones start, answer and are set back.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod common;

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{interleave, median, quantile};
use rund_rt::{CloneSpec, Output, Runtime, Stdin, Template};

use common::{PATIENCE, Serve, runtime};

/// Starts clones that are alive together; gives how many a second. Each answers when it is
/// started, and again when all are.
fn alive(runtime: &Runtime, template: &Template, number: usize) -> f64 {
    let began = Instant::now();
    let mut sandboxes = Vec::new();
    let mut pids = HashSet::new();
    for i in 0..number {
        let spec = CloneSpec::new().stdin(Stdin::Piped).stdout(Output::Piped);
        let sandbox = runtime.start(template, spec).unwrap();
        let mut input = sandbox.take_stdin().unwrap();
        input.write_all(format!("first {i}\n").as_bytes()).unwrap();
        let output = BufReader::new(sandbox.take_stdout().unwrap());
        sandboxes.push((sandbox, input, output));
    }
    let mut check = |word: &str, output: &mut BufReader<std::fs::File>, i: usize| {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let pid = line
            .strip_prefix(&format!("motto {word} {i} "))
            .unwrap_or_else(|| panic!("{line}"));
        pids.insert(pid.trim().to_owned());
    };
    for (i, (_, _, output)) in sandboxes.iter_mut().enumerate() {
        check("first", output, i);
    }
    let took = began.elapsed().as_secs_f64();
    for (i, (_, input, output)) in sandboxes.iter_mut().enumerate() {
        input.write_all(format!("again {i}\n").as_bytes()).unwrap();
        check("again", output, i);
    }
    assert_eq!(pids.len(), number);
    number as f64 / took
}

/// One clone with its own input, from start to the next one's turn; gives milliseconds.
fn one(runtime: &Runtime, template: &Template, i: usize) -> f64 {
    let began = Instant::now();
    let spec = CloneSpec::new().stdin(Stdin::Bytes(format!("{i}\n").into_bytes()));
    let sandbox = runtime.start(template, spec).unwrap();
    let exit = sandbox.wait(PATIENCE).unwrap();
    // With the machine set back, as the next one finds it.
    drop(sandbox);
    assert!(
        exit.stdout.starts_with(format!("motto {i} ").as_bytes()),
        "{exit:?}"
    );
    began.elapsed().as_secs_f64() * 1e3
}

/// Runs so many at once, one after the other each; gives runs a second.
fn sequence(runtime: &Runtime, template: &Template, threads: usize, time: Duration) -> f64 {
    let began = Instant::now();
    let done: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut done = 0;
                    while began.elapsed() < time {
                        one(runtime, template, done);
                        done += 1;
                    }
                    done
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    done as f64 / began.elapsed().as_secs_f64()
}

/// The same program as a process of the host's.
fn native(serve: &Serve) -> f64 {
    let began = Instant::now();
    let mut child = Command::new(&serve.program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"1\n").unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success() && out.stdout.starts_with(b"none 1 "));
    began.elapsed().as_secs_f64() * 1e3
}

/// The same guest without a template: a runtime, a zygote, the program loaded, a machine.
fn cold(serve: &Serve) -> f64 {
    let began = Instant::now();
    let runtime = runtime();
    let template = runtime.prepare(&serve.spec()).unwrap();
    one(&runtime, &template, 1);
    began.elapsed().as_secs_f64() * 1e3
}

/// Confines this process, and what it starts, to its first processors.
fn on_cores(number: usize) {
    let mut set = nix::sched::CpuSet::new();
    for core in 0..number {
        set.set(core).unwrap();
    }
    // A machine with fewer keeps those it has.
    let _fewer = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set);
}

fn main() {
    rund_rt::init();
    let ids = [
        (
            "1",
            "200 clones alive at once, output asserted for each, all answer again: started",
            "/s",
        ),
        (
            "1b",
            "start, output, reset in sequence, each with its own input: one core",
            "/s",
        ),
        (
            "1c",
            "start, output, reset in sequence, each with its own input: two cores",
            "/s",
        ),
        ("1d", "start, output and reset of a clone, p50", "ms"),
        ("1e", "start and output of a clone", "ms"),
    ];
    let figure = |i: usize| {
        let (id, what, unit) = ids[i];
        Figure::new(format!("rund-rt/{id}"), what, unit)
    };
    if !Capability::Kvm.is_present() {
        for i in 0..ids.len() {
            figure(i).without(Capability::Kvm).emit().unwrap();
        }
        return;
    }
    let quick = is_quick();
    let serve = Serve::new();
    let rounds = if quick { 1 } else { 7 };
    let number = if quick { 20 } else { 200 };
    let shared = runtime();
    let isolation = shared.capabilities().isolation;
    let template = serve.template(&shared);
    let rates: Vec<f64> = (0..rounds)
        .map(|_| {
            let cold = serve.template(&shared);
            alive(&shared, &cold, number)
        })
        .collect();
    figure(0)
        .samples(rates)
        .note(format!(
            "kvm-elf, {isolation}; a static C program that reads its root, writes its upper layer \
             and says its id; nothing made ahead but the template"
        ))
        .emit()
        .unwrap();

    let time = Duration::from_millis(if quick { 50 } else { 1000 });
    for (i, cores) in [(1, 1), (2, 2)] {
        on_cores(cores);
        // Zygotes and monitors run where their owner may.
        let runtime = runtime();
        let template = serve.template(&runtime);
        sequence(&runtime, &template, cores, time / 4);
        let rates: Vec<f64> = (0..rounds)
            .map(|_| sequence(&runtime, &template, cores, time))
            .collect();
        figure(i)
            .samples(rates)
            .note(format!(
                "kvm-elf, {isolation}; a monitor process for each thread, held and reset"
            ))
            .emit()
            .unwrap();
    }

    let samples = interleave(
        20,
        if quick { 3 } else { 501 },
        || one(&shared, &template, 1),
        || native(&serve),
    );
    let (p99, native_p99) = (
        quantile(&samples.ours, 0.99),
        quantile(&samples.rival, 0.99),
    );
    figure(3)
        .against("native process spawn of the same binary", samples)
        .note(format!(
            "kvm-elf, {isolation}; p99 {p99:.3} ms, native {native_p99:.3} ms"
        ))
        .emit()
        .unwrap();
    let samples = interleave(
        2,
        if quick { 1 } else { 31 },
        || {
            median(
                &(0..9)
                    .map(|i| one(&shared, &template, i))
                    .collect::<Vec<_>>(),
            )
        },
        || cold(&serve),
    );
    figure(4)
        .against("cold start of the same guest", samples)
        .note(format!(
            "kvm-elf, {isolation}; cold: runtime, zygote, template and machine are made first"
        ))
        .emit()
        .unwrap();
}
