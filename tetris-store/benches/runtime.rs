//! Figure 6c: instances that serve the same requests within the same SLO: batched and concurrent
//! ones, chosen by the profile, beside one instance per request.
//!
//! The closure is a real one: three dense layers of 2048 x 2048 weights (48 MB, more than the
//! caches hold), so that a batch reads the weights once. Both sides use the same weights, in one
//! copy, and see the same arrivals (Poisson, seeded). The rival starts an instance whenever a request
//! finds none idle, as platforms that serve one request per instance do, and keeps it; its start
//! takes no time here, which favours it.
#![allow(
    clippy::unwrap_used,
    reason = "a bench says what went wrong by failing"
)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{interleave, median, quantile};
use carlsbad_kit::seed::Rng;
use carlsbad_types::ByteSize;
use gemm::{Parallelism, gemm};
use tetris_store::runtime::{CpuPrice, Instance, InstanceConfig, Profile, ProfileRow};

const WIDTH: usize = 2048;
const LAYERS: usize = 3;
const SLO: Duration = Duration::from_millis(200);
/// Of what two instances that serve one request at a time could do at most.
const LOAD: f64 = 0.75;

type Vector = Vec<f32>;

struct Model {
    layers: Vec<Vector>,
}

impl Model {
    fn new() -> Self {
        let mut random = Rng::with_seed(1);
        let scale = 1.0 / (WIDTH as f32).sqrt();
        let mut layer = || {
            (0..WIDTH * WIDTH)
                .map(|_| (random.f32() - 0.5) * scale)
                .collect()
        };
        Self {
            layers: (0..LAYERS).map(|_| layer()).collect(),
        }
    }

    /// One output for each input: layers with a rectifier between.
    fn infer(&self, inputs: &[Vector]) -> Vec<Vector> {
        let mut x: Vector = inputs.concat();
        for layer in &self.layers {
            let mut y = vec![0.0f32; x.len()];
            let (width, stride) = (WIDTH, WIDTH as isize);
            let (to, from, weights) = (y.as_mut_ptr(), x.as_ptr(), layer.as_ptr());
            // Transposed, so that the long side is the one that is vectorised.
            // SAFETY: y and x are WIDTH x inputs and the layer is WIDTH x WIDTH, all dense and
            // column-major, and y is no part of the others.
            unsafe {
                gemm(
                    width,
                    inputs.len(),
                    width,
                    to,
                    stride,
                    1,
                    false,
                    weights,
                    stride,
                    1,
                    from,
                    stride,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    Parallelism::None,
                );
            }
            y.iter_mut().for_each(|v| *v = v.max(0.0));
            x = y;
        }
        x.chunks_exact(WIDTH).map(<[f32]>::to_vec).collect()
    }
}

fn input(number: usize) -> Vector {
    (0..WIDTH)
        .map(|i| ((i * 31 + number * 17) % 97) as f32 / 97.0)
        .collect()
}

/// Time of a batch of `batch` while `concurrency` threads run such batches: the 99th percentile,
/// and half as much again, since a batch is started at the last moment by it.
fn measure(model: &Arc<Model>, batch: u32, concurrency: u32) -> ProfileRow {
    let rounds = if is_quick() { 2 } else { 30 };
    let times = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..concurrency {
            scope.spawn(|| {
                let inputs: Vec<_> = (0..batch as usize).map(input).collect();
                for _ in 0..rounds {
                    let start = Instant::now();
                    std::hint::black_box(model.infer(&inputs));
                    times.lock().unwrap().push(start.elapsed().as_secs_f64());
                }
            });
        }
    });
    let tail = quantile(&times.into_inner().unwrap(), 0.99);
    ProfileRow {
        cpus: f64::from(concurrency),
        gpu_share: 0.0,
        memory: ByteSize::mib(8 + u64::from(batch * concurrency) / 8),
        batch,
        concurrency,
        latency: Duration::from_secs_f64(tail * 1.5),
    }
}

/// Sends requests at their times.
fn send_all(arrivals: &[Duration], mut send: impl FnMut(usize, Instant)) {
    let start = Instant::now();
    for (number, at) in arrivals.iter().enumerate() {
        let wait = at.saturating_sub(start.elapsed());
        if !wait.is_zero() {
            thread::sleep(wait);
        }
        send(number, start + *at);
    }
}

/// The share of requests that were answered in time.
fn ours(model: &Arc<Model>, row: ProfileRow, instances: usize, arrivals: &[Duration]) -> f64 {
    let instances: Vec<_> = (0..instances)
        .map(|_| {
            let model = model.clone();
            let config = InstanceConfig::new(row, SLO);
            Instance::start(config, move |batch: Vec<Vector>| model.infer(&batch)).unwrap()
        })
        .collect();
    let mut tickets = Vec::new();
    send_all(arrivals, |number, _| {
        // Turned away is not in time.
        if let Ok(ticket) = instances[number % instances.len()].submit(input(number)) {
            tickets.push((number, ticket));
        }
    });
    let mut in_time = 0;
    for (number, ticket) in tickets {
        if let Ok(output) = ticket.wait() {
            in_time += 1;
            if number % 97 == 0 {
                let alone = model.infer(&[input(number)]);
                let same = output
                    .iter()
                    .zip(&alone[0])
                    .all(|(a, b)| (a - b).abs() < 1e-4);
                assert!(same, "a batch gives other answers than requests alone");
            }
        }
    }
    f64::from(in_time) / arrivals.len() as f64
}

/// One request per instance: how many instances that took, and the share answered in time.
fn one_per_request(model: &Arc<Model>, arrivals: &[Duration]) -> (f64, f64) {
    /// A request and when it came; nothing to end.
    type Job = Option<(Vector, Instant)>;
    let (free, idle): (Sender<Sender<Job>>, Receiver<Sender<Job>>) = channel();
    let in_time = AtomicUsize::new(0);
    let instances = thread::scope(|scope| {
        let mut instances: Vec<Sender<Job>> = Vec::new();
        send_all(arrivals, |number, at| {
            let instance = idle.try_recv().unwrap_or_else(|_| {
                let (sender, jobs) = channel::<Job>();
                instances.push(sender.clone());
                let (free, own, in_time) = (free.clone(), sender.clone(), &in_time);
                scope.spawn(move || {
                    while let Ok(Some((input, asked))) = jobs.recv() {
                        std::hint::black_box(model.infer(&[input]));
                        if asked.elapsed() <= SLO {
                            in_time.fetch_add(1, Ordering::Relaxed);
                        }
                        free.send(own.clone()).unwrap();
                    }
                });
                sender
            });
            instance.send(Some((input(number), at))).unwrap();
        });
        for instance in &instances {
            instance.send(None).unwrap();
        }
        instances.len()
    });
    let in_time = in_time.into_inner() as f64 / arrivals.len() as f64;
    (instances as f64, in_time)
}

fn main() {
    let model = Arc::new(Model::new());
    let alone = measure(&model, 1, 1);
    let mut rows = vec![alone];
    for batch in [4, 8, 16, 32] {
        rows.push(measure(&model, batch, 1));
    }
    rows.push(measure(&model, 16, 2));
    let profile = Profile::new(rows).unwrap();

    let rounds = if is_quick() { 1 } else { 7 };
    let seconds = if is_quick() { 0.3 } else { 6.0 };
    let load = LOAD * 1.5 * measure(&model, 1, 2).qps();
    let row = profile
        .by_cost(SLO, CpuPrice::default(), load)
        .first()
        .copied()
        .unwrap();
    let instances = (load / row.rps_max()).ceil();

    let arrivals = |round: u64| {
        let mut random = Rng::with_seed(round);
        let mut at = 0.0;
        let mut all = Vec::new();
        loop {
            at += -(1.0 - random.f64()).ln() / load;
            if at > seconds {
                return all;
            }
            all.push(Duration::from_secs_f64(at));
        }
    };
    let (mut our_share, mut their_share) = (Vec::new(), Vec::new());
    let (mut our_round, mut their_round) = (0, 0);
    let samples = interleave(
        0,
        rounds,
        || {
            our_round += 1;
            our_share.push(ours(&model, row, instances as usize, &arrivals(our_round)));
            instances
        },
        || {
            their_round += 1;
            let (instances, in_time) = one_per_request(&model, &arrivals(their_round));
            their_share.push(in_time);
            instances
        },
    );
    let percent = |shares: &[f64]| median(shares) * 100.0;
    if !is_quick() {
        assert!(
            percent(&our_share) >= 99.0,
            "only {:.2}% within the SLO: the figure would mean nothing",
            percent(&our_share)
        );
    }
    let note = format!(
        "{load:.0} requests/s for {seconds} s a round, SLO {SLO:?}; b = {}, c = {}, L = {:.1} ms \
         (alone {:.1} ms); within the SLO: ours {:.2}%, the rival {:.2}%",
        row.batch,
        row.concurrency,
        row.latency.as_secs_f64() * 1e3,
        alone.latency.as_secs_f64() * 1e3,
        percent(&our_share),
        percent(&their_share),
    );
    Figure::new(
        "tetris-store/6c",
        "instances that serve a fixed load under a fixed SLO, with real closures",
        "instances",
    )
    .against("one instance per request", samples)
    .note(note)
    .emit()
    .unwrap();
}
