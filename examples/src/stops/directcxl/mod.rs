//! directcxl: far memory that is loaded from, beside what systems do that cannot; and a pool whose
//! processes are killed.

mod far;
pub(crate) mod worker;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::Role as ChildRole;
use carlsbad_kit::plot::{Axis, Bar, BarPlot, Kind, cdf};
use carlsbad_kit::sample::{median, quantile};
use carlsbad_kit::scratch;
use carlsbad_types::ByteSize;
use directcxl::{Contents, Epoch, FileHdm, FormatOptions, NamespaceOptions, Pool, Role};

use crate::stop::{Least, Rival, Visit};
use worker::Order;

/// Memory that is chased through.
const LENGTH: u64 = 64 << 20;
/// What the specification asks of figure 1.
const LEAST: f64 = 1.0 / 6.0;
const KILLS: usize = 12;

pub(crate) fn visit(visit: &mut Visit<'_>) -> Result<()> {
    let has_huge = visit.has(
        Capability::HugeTlb,
        "far memory on huge pages: this one is on 4 KiB pages, and slower",
    );
    let whole = LENGTH + (16 << 20);
    let huge = if has_huge {
        scratch::on_hugetlbfs(whole).ok()
    } else {
        None
    };
    let small = scratch::on_tmpfs()?;
    let folder = huge.as_ref().map_or(small.path(), scratch::HugeDir::path);
    latency(visit, &folder.join("pool"), whole)?;
    recovery(visit, &small.path().join("killed"))
}

/// The paper's comparison: a load, a one-sided copy, a page swap, of the same lines.
fn latency(visit: &mut Visit<'_>, path: &Path, whole: u64) -> Result<()> {
    visit.step("making a pool, and a chain of every cache line of a namespace");
    let file = FileHdm::create(path, ByteSize::new(whole))?;
    let pool = Pool::format(file, FormatOptions::default())?;
    let options = NamespaceOptions {
        contents: Contents::Kept,
        populate: true,
    };
    let memory = pool.create("chain", ByteSize::new(LENGTH), options)?;
    let chain = far::Chain::write(&memory)?;

    visit.step("following it by loads, and by one-sided copies from another process");
    let mut owner = ChildRole::main(worker::ROLE).start(&Order::Own {
        path: path.to_owned(),
        handle: memory.handle().to_bytes().to_vec(),
    })?;
    let there: usize = owner.hear("at")?.parse()?;
    let direct = chain.direct(&memory);
    let copies = chain.one_sided(owner.id(), there)?;
    owner.say("done")?;
    ensure!(owner.wait()?.success(), "the other process failed");
    visit.check(
        "Another process attached by a handle of 48 bytes, and every line read there is the one \
         that was written here",
        copies.right,
    );
    visit.check(
        "Following the chain by loads visits the lines in the order that was written",
        direct.right,
    );
    let swap = if visit.has(Capability::Userfaultfd, "page swap as a rival") {
        visit.step("following it through a page cache that holds a tenth");
        let swap = chain.page_swap(&memory)?;
        visit.check("So does following it through page swap", swap.right);
        swap.ns
    } else {
        Vec::new()
    };
    let median_of = |name, samples: &[f64], kind| {
        let ns = median(samples);
        let times = ns / median(&direct.ns);
        Bar::new(name, ns, kind).remark(format!("{ns:.0} ns, {times:.1}x"))
    };
    let mut bars = BarPlot::new("A read of 64 bytes from far memory", "ns")
        .bar(median_of("load from a namespace", &direct.ns, Kind::Ours))
        .bar(median_of("one-sided copy", &copies.ns, Kind::Rival));
    let mut curves = vec![
        ("load from a namespace", Kind::Ours, &direct.ns[..]),
        ("one-sided copy", Kind::Rival, &copies.ns[..]),
    ];
    if !swap.is_empty() {
        bars = bars.bar(median_of("page swap, 10% here", &swap, Kind::Rival));
        curves.push(("page swap, 10% here", Kind::Rival, &swap[..]));
    }
    visit.picture(
        "A pointer chase: every read waits for the one before, as in the paper's figure 8. All of \
         it is this machine's memory; the one-sided copy (process_vm_readv) stands in for RDMA \
         without a network.",
        bars.svg(),
    );
    visit.picture(
        "The same, as means of small batches: the tail is where page swap hurts.",
        cdf("64 B reads", Axis::log("ns"), curves).svg(),
    );
    visit.table(
        "Latency of a 64 B read, in nanoseconds",
        vec!["how", "median", "90%", "99%"],
        [
            ("load", &direct.ns),
            ("one-sided copy", &copies.ns),
            ("page swap", &swap),
        ]
        .into_iter()
        .filter(|(_, samples)| !samples.is_empty())
        .map(|(how, samples)| {
            let at = |q| format!("{:.0}", quantile(samples, q));
            vec![how.to_owned(), at(0.5), at(0.9), at(0.99)]
        })
        .collect(),
    );
    visit.figure(
        "64 B read of far memory, by a load",
        "ns",
        direct.ns,
        Rival {
            name: "one-sided copy",
            samples: copies.ns,
        },
        Least::AtMost(LEAST),
    );
    Ok(())
}

/// A process that makes and removes namespaces is killed again and again.
fn recovery(visit: &mut Visit<'_>, path: &Path) -> Result<()> {
    visit.step("killing a process that changes a pool, again and again");
    let options = FormatOptions {
        // Small arenas, so that new ones are begun all the time.
        entries: 64,
        ..FormatOptions::default()
    };
    drop(Pool::format(
        FileHdm::create(path, ByteSize::mib(128))?,
        options,
    )?);
    let mut rng = carlsbad_kit::seed::Rng::with_seed(22);
    let (mut lost, mut damaged, mut leaked, mut done) = (0, 0, 0, 0);
    let mut rows = Vec::new();
    for round in 0..KILLS {
        let mut worker = ChildRole::main(worker::ROLE).start(&Order::Change {
            path: path.to_owned(),
            round,
        })?;
        // It says what it has done; what it was doing when it was killed nobody knows.
        let until = rng.usize(5..120);
        let mut told = Vec::new();
        while told.len() < until {
            told.push(worker.hear_any().context("the worker ended by itself")?);
        }
        worker.kill();
        while let Ok(words) = worker.hear_any() {
            told.push(words);
        }
        done += told.len();
        let pool = Pool::open(FileHdm::open(path)?, Role::Writer(Epoch::CURRENT))?;
        let report = pool.check();
        damaged += report.problems.len();
        let held = worker::replay(&told, round);
        for (name, content) in &held.certain {
            let kept = pool
                .attach(name)
                .ok()
                .and_then(|namespace| worker::content(&namespace).ok());
            lost += usize::from(kept != Some(*content));
        }
        let reclaimed = pool.reclaim()?;
        leaked += usize::from(pool.info()?.quarantined > ByteSize::ZERO);
        if round < 4 {
            rows.push(vec![
                (round + 1).to_string(),
                told.len().to_string(),
                held.certain.len().to_string(),
                report.entries.to_string(),
                report.problems.len().to_string(),
                reclaimed.to_string(),
            ]);
        }
        for info in pool.list()? {
            pool.remove(&info.name)?;
        }
    }
    visit.check(
        format!("{KILLS} times SIGKILL in the midst of {done} changes: no namespace was lost that was said to be there"),
        lost == 0,
    );
    visit.check(
        "After each, every structure of the pool was whole",
        damaged == 0,
    );
    visit.check("After each, no memory was held by the dead", leaked == 0);
    visit.table(
        "What was left after a kill (the first four)",
        vec![
            "kill",
            "changes said to be done",
            "namespaces that must be there",
            "entries in the log",
            "problems",
            "reclaimed",
        ],
        rows,
    );
    Ok(())
}
