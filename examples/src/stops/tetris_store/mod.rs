//! tetris-store: two models of handwritten digits, in eight processes, on one copy of what they
//! have in common.

mod digits;
pub(crate) mod worker;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{Child, Role};
use carlsbad_kit::memory::MemoryUse;
use carlsbad_kit::plot::{Axis, Kind, LinePlot, Series, cdf};
use carlsbad_kit::sample::median;
use carlsbad_kit::scratch;
use tetris_store::{Store, StoreConfig, open_model};

use crate::stop::{Least, Rival, Visit};
use digits::{Digits, Network, Task};
use worker::{Order, Report, Weights};

const TASKS: [Task; 2] = [Task::Digit, Task::Even];
/// Half of them serve one model, half the other.
const PROCESSES: usize = 8;
const EPOCHS: usize = 4;
/// How soon the tour lets the store forget what nobody uses.
const KEEP_ALIVE: Duration = Duration::from_millis(200);
/// What the specification asks of 8 processes with one model (figure 1).
const MOST_MEMORY: f64 = 0.20;

const MIB: f64 = (1 << 20) as f64;

pub(crate) fn visit(visit: &mut Visit<'_>) -> Result<()> {
    visit.has(
        Capability::SharedMemory,
        "a store in memory: this one is on disk",
    );
    let scratch = scratch::on_tmpfs().context("no place for a store")?;
    let files = scratch::on_disk()?;

    visit.step("training a classifier of handwritten digits");
    let (train, test) = Digits::load()?;
    let path_of = |task: Task| files.path().join(format!("{}.safetensors", task.name()));
    digits::train_base(&train, EPOCHS, &path_of(Task::Digit))?;
    visit.step("fine-tuning it to tell even from odd");
    digits::fine_tune(&train, &path_of(Task::Digit), EPOCHS, &path_of(Task::Even))?;

    visit.step("bringing both models into a store");
    let store = Store::open(StoreConfig {
        keep_alive: KEEP_ALIVE,
        ..StoreConfig::at(scratch.path().join("store"))
    })?;
    let mut ingested = Vec::new();
    for task in TASKS {
        ingested.push(store.ingest(&*open_model(&path_of(task))?)?);
    }
    visit.table(
        "What each model brought into the store",
        vec!["model", "tensors", "bytes", "written", "there already"],
        TASKS
            .iter()
            .zip(&ingested)
            .map(|(task, model)| {
                vec![
                    task.name().to_owned(),
                    model.tensors.to_string(),
                    model.bytes.to_string(),
                    model.written.to_string(),
                    model.shared().to_string(),
                ]
            })
            .collect(),
    );
    let frozen = frozen_bytes(&path_of(Task::Digit), &path_of(Task::Even))?;
    visit.check(
        format!(
            "Of the fine-tuned model only the tuned layers were stored: {} written",
            ingested[1].written
        ),
        ingested[1].shared().get() == frozen,
    );

    visit.step("serving with private copies");
    let private = serve(None, |task| Weights::Private {
        file: path_of(task),
    })?;
    visit.step("serving from the store");
    let shared = serve(Some(&store), |task| Weights::Shared {
        root: store.root().to_owned(),
        model: ingested[usize::from(task == Task::Even)].model.to_string(),
    })?;

    for (i, task) in TASKS.into_iter().enumerate() {
        let expected = alone(task, &path_of(task), &test)?;
        let of_task = |served: &Served| -> Vec<Report> {
            served
                .reports
                .iter()
                .skip(i)
                .step_by(TASKS.len())
                .cloned()
                .collect()
        };
        let (ours, rivals) = (of_task(&shared), of_task(&private));
        let accuracy = ours
            .iter()
            .map(|report| report.accuracy)
            .fold(1.0, f64::min);
        visit.check(
            format!(
                "The {} classifier gets {:.1}% of {} digits right that it has not seen",
                task.name(),
                accuracy * 100.0,
                test.images.dim(0)?
            ),
            accuracy >= 0.95,
        );
        visit.check(
            format!(
                "Its weights are those of the file, bit by bit, in {} processes",
                ours.len()
            ),
            ours.iter().all(|report| report.weights == expected.weights),
        );
        visit.check(
            "Its outputs are those of candle's own loader, bit by bit",
            ours.iter()
                .chain(&rivals)
                .all(|report| report.outputs == expected.outputs),
        );
    }
    let copied: u64 = shared.reports.iter().map(|report| report.copied).sum();
    visit.check("No process copied a weight", copied == 0);

    figures(
        visit,
        &private,
        &shared,
        ingested.iter().map(|model| model.written.get()).sum(),
    );

    visit.step("waiting for the store to forget");
    std::thread::sleep(KEEP_ALIVE);
    store.reclaim()?;
    std::thread::sleep(KEEP_ALIVE + Duration::from_millis(50));
    store.reclaim()?;
    let stats = store.stats()?;
    visit.check(
        "When nobody serves them any more, both models are freed",
        stats.models == 0 && stats.objects == 0,
    );
    Ok(())
}

fn figures(visit: &mut Visit<'_>, private: &Served, shared: &Served, unique: u64) {
    let at_end = |served: &Served| served.growth.last().map_or(f64::NAN, |point| point.1);
    visit.figure(
        format!("of the weights' memory, for {PROCESSES} processes with two models"),
        "MiB",
        vec![at_end(shared)],
        Rival {
            name: "candle's MmapedSafetensors",
            samples: vec![at_end(private)],
        },
        Least::AtMost(MOST_MEMORY),
    );
    let ready = |served: &Served| -> Vec<f64> {
        served
            .reports
            .iter()
            .map(|report| report.ready_ms)
            .collect()
    };
    let (ours, rival) = (ready(shared), ready(private));
    visit.picture(
        "Memory that the models add: what processes map of the store or hold of their own (PSS), \
         and what of the store nobody maps.",
        LinePlot::new(
            "Memory over the number of processes, two models in turn",
            Axis::new("processes"),
            Axis::new("MiB added"),
        )
        .series(Series::new(
            "a copy each",
            Kind::Rival,
            private.growth.clone(),
        ))
        .series(Series::new(
            "tetris-store",
            Kind::Ours,
            shared.growth.clone(),
        ))
        .series(Series::new(
            "unique bytes",
            Kind::Bound,
            vec![
                (1.0, unique as f64 / MIB),
                (PROCESSES as f64, unique as f64 / MIB),
            ],
        ))
        .svg(),
    );
    visit.picture(
        format!(
            "From the beginning of the load to the end of the first inference: median {:.1} ms, \
             beside {:.1} ms.",
            median(&ours),
            median(&rival)
        ),
        cdf(
            "Ready to serve",
            Axis::log("ms"),
            [
                ("tetris-store", Kind::Ours, &ours[..]),
                ("candle load", Kind::Rival, &rival[..]),
            ],
        )
        .svg(),
    );
}

/// What came of serving both models in processes of their own.
struct Served {
    /// Number of processes, and the memory they add, in MiB.
    growth: Vec<(f64, f64)>,
    /// In the order of the processes, whose tasks alternate.
    reports: Vec<Report>,
}

/// Starts all processes, lets one after the other load its model, and measures after each.
fn serve(store: Option<&Store>, weights: impl Fn(Task) -> Weights) -> Result<Served> {
    let mut workers: Vec<Child> = Vec::new();
    for i in 0..PROCESSES {
        let task = TASKS[i % TASKS.len()];
        let order = Order {
            task,
            weights: weights(task),
        };
        // What a process has freed goes back to the machine at once and is not counted: both
        // sides hold what they need, and no more.
        let worker = Role::main(worker::ROLE)
            .env("MALLOC_MMAP_THRESHOLD_", "65536")
            .env("MALLOC_TRIM_THRESHOLD_", "0")
            .start(&order)?;
        worker.hear("waiting")?;
        workers.push(worker);
    }
    let before = MemoryUse::sum(workers.iter().map(Child::id))?.pss.get() as f64;
    let mut served = Served {
        growth: Vec::new(),
        reports: Vec::new(),
    };
    for i in 0..PROCESSES {
        workers[i].say("serve")?;
        served
            .reports
            .push(serde_json::from_str(&workers[i].hear_any()?)?);
        let added = in_use(&workers, store)? - before;
        served.growth.push(((i + 1) as f64, added / MIB));
    }
    for mut worker in workers {
        ensure!(worker.wait()?.success(), "a worker failed");
    }
    Ok(served)
}

/// Bytes of the workers, and of the store: once, mapped or not.
fn in_use(workers: &[Child], store: Option<&Store>) -> Result<f64> {
    let mut bytes = MemoryUse::sum(workers.iter().map(Child::id))?.pss.get() as f64;
    if let Some(store) = store {
        let inside = |name: &str| Path::new(name).starts_with(store.root());
        for worker in workers {
            bytes -= MemoryUse::of_mappings(worker.id(), inside)?.pss.get() as f64;
        }
        bytes += store.stats()?.stored.get() as f64;
    }
    Ok(bytes)
}

/// Bytes of the tensors that two files have in common, and that are large enough to be stored by
/// themselves.
fn frozen_bytes(base: &Path, tuned: &Path) -> Result<u64> {
    /// Smaller tensors are packed per model.
    const OF_THEIR_OWN: usize = 64 << 10;
    let load = |path| candle_core::safetensors::load(path, &Device::Cpu);
    let (base, tuned) = (load(base)?, load(tuned)?);
    let mut bytes = 0;
    for (name, tensor) in &tuned {
        let size = tensor.elem_count() * tensor.dtype().size_in_bytes();
        let same = match base.get(name) {
            Some(other) => worker::hash([tensor])? == worker::hash([other])?,
            None => false,
        };
        if same && size >= OF_THEIR_OWN {
            bytes += size as u64;
        }
    }
    Ok(bytes)
}

/// What a process that loads the file by candle's own means gets.
fn alone(task: Task, file: &Path, test: &Digits) -> Result<Expected> {
    // SAFETY: the file is the tour's own, and nobody writes to it any more.
    let weights =
        unsafe { VarBuilder::from_mmaped_safetensors(&[file], DType::F32, &Device::Cpu)? };
    let network = Network::new(task, &weights)?;
    Ok(Expected {
        outputs: worker::hash([&network.answer(test)?])?,
        weights: worker::hash(network.weights())?,
    })
}

struct Expected {
    outputs: String,
    weights: String,
}
