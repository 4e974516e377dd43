//! Crashes: of a host, which loses what its caches had not written back, and of a process, which is
//! killed at every step.
#![allow(
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use carlsbad_kit::seed::Rng;
use carlsbad_types::ByteSize;
use common::MIB2;
use common::caches::World;
use directcxl::backend::Coherence;
use directcxl::flush::Step;
use directcxl::heap::{Heap, HeapOptions, Place};
use directcxl::{Epoch, Error, FormatOptions, NamespaceOptions, Pool, Role};

/// What a pool holds: length and content by name.
type Contents = BTreeMap<String, (u64, u64)>;

fn cases(full: usize) -> usize {
    if std::env::var_os("CARLSBAD_SOAK").is_some() {
        full * 10
    } else {
        full
    }
}

fn format(seed: u64, without: Option<Step>) -> (Arc<World>, Pool) {
    let world = World::new(ByteSize::mib(24), 1, seed);
    world.take_out(without);
    let options = FormatOptions {
        // Small, so that new arenas are begun all the time.
        entries: 12,
        // There is nothing: to look for it in the model takes longer than all the rest.
        overwrite: true,
        ..FormatOptions::default()
    };
    let pool = Pool::format(world.host(0, Coherence::Hardware), options).unwrap();
    (world, pool)
}

/// One change, and what the pool holds when it is done.
fn step(pool: &Pool, rng: &mut Rng, model: &Contents) -> (Contents, Result<(), Error>) {
    let mut after = model.clone();
    let name = format!("n{}", rng.u32(0..5));
    let done = match (rng.u32(0..8), model.get(&name).copied()) {
        (0..4, None) => {
            let (length, content) = (rng.u64(1..3) * MIB2.get(), rng.u64(1..));
            after.insert(name.clone(), (length, content));
            let made = pool.create(&name, ByteSize::new(length), NamespaceOptions::default());
            made.and_then(|namespace| {
                // The content counts when it is published: a crash before leaves zeroes.
                namespace.write(0, &content.to_le_bytes())?;
                namespace.write(length - 8, &content.to_le_bytes())?;
                namespace.publish(0..8)?;
                namespace.publish(length - 8..length)
            })
        }
        (0..4, Some(_)) => {
            after.remove(&name);
            pool.remove(&name)
        }
        (4, Some((old, content))) => {
            let length = if old == MIB2.get() { 2 * old } else { old / 2 };
            after.insert(name.clone(), (length, content));
            pool.resize(&name, ByteSize::new(length))
        }
        (5, _) => pool.reclaim().map(drop),
        _ => pool.list().map(drop),
    };
    match done {
        // What was refused changed nothing.
        Err(Error::NoRoom { .. } | Error::LogFull { .. }) => (model.clone(), Ok(())),
        done => (after, done),
    }
}

/// Whether the pool holds what one of the models says.
fn holds(pool: &Pool, before: &Contents, after: &Contents) -> Result<(), String> {
    let mut found = Contents::new();
    for info in pool.list().map_err(|why| why.to_string())? {
        let namespace = pool.attach(&info.name).map_err(|why| why.to_string())?;
        let mut bytes = [[0; 8]; 2];
        namespace.read(0, &mut bytes[0]).unwrap();
        let length = info.length.get();
        namespace.read(length - 8, &mut bytes[1]).unwrap();
        found.insert(info.name, (length, u64::from_le_bytes(bytes[0])));
    }
    for (name, (length, content)) in before {
        // What was there before the change, and is after it, is there whatever happened.
        if let Some((_, same)) = after.get(name)
            && same == content
            && found.get(name).map(|(_, content)| *content) != Some(*content)
        {
            return Err(format!("{name} of {length} is lost or changed: {found:?}"));
        }
    }
    let lengths = |contents: &Contents| -> BTreeMap<String, u64> {
        let each = contents.iter();
        each.map(|(name, (length, _))| (name.clone(), *length))
            .collect()
    };
    let now = lengths(&found);
    if now != lengths(before) && now != lengths(after) {
        return Err(format!("neither {before:?} nor {after:?} but {found:?}"));
    }
    Ok(())
}

/// Runs changes until the fuse is burnt, and opens what is left.
fn case(seed: u64, without: Option<Step>) -> Result<(), String> {
    let mut rng = Rng::with_seed(seed);
    let (world, pool) = format(seed, without);
    let mut model = Contents::new();
    let mut after = model.clone();
    let fuse = rng.u64(0..160);
    world.light(fuse);
    while !world.has_stopped() {
        let (next, done) = step(&pool, &mut rng, &model);
        after = next;
        match done {
            Ok(()) => model = after.clone(),
            Err(Error::Removed { .. }) => break,
            Err(why) => return Err(format!("seed {seed}: {why}")),
        }
    }
    let keep = [0.0, 0.5, 1.0][rng.usize(0..3)];
    let left = world.after_crash(keep, seed);
    let backend = left.host(0, Coherence::Hardware);
    let pool = Pool::open(backend, Role::Writer(Epoch::CURRENT))
        .map_err(|why| format!("seed {seed}: {why}"))?;
    holds(&pool, &model, &after).map_err(|why| format!("seed {seed}: {why}"))?;
    let report = pool.check();
    if !report.is_ok() {
        return Err(format!("seed {seed}: {report:?}"));
    }
    // And it goes on from there.
    let (next, done) = step(&pool, &mut rng, &Contents::new());
    let known = matches!(
        done,
        Ok(()) | Err(Error::NameTaken { .. } | Error::UnknownNamespace { .. })
    );
    drop(next);
    if known {
        Ok(())
    } else {
        Err(format!("seed {seed}: {done:?}"))
    }
}

#[test]
fn no_committed_namespace_is_lost_whatever_lines_a_crash_keeps() {
    let first = carlsbad_kit::seed::rng("crash").u64(..) >> 1;
    for i in 0..cases(10_000) as u64 {
        case(first + i, None).unwrap();
    }
}

/// The control: with a flush left out, a crash loses something.
#[test]
fn a_crash_loses_something_where_a_flush_is_left_out() {
    for without in [Step::Entry, Step::Arena, Step::RecordFirst, Step::Publish] {
        let fails = (0..3000).any(|seed| {
            // An assertion of the model may fail as well as the comparison.
            catch_unwind(AssertUnwindSafe(|| case(seed, Some(without)).is_err())).unwrap_or(true)
        });
        assert!(fails, "nothing was lost without {without:?}");
    }
}

/// A pool is formatted over another one, and the host stops in the middle.
fn format_case(seed: u64, without: Option<Step>) -> Result<(), String> {
    let mut rng = Rng::with_seed(seed);
    let (world, pool) = format(seed, None);
    let old = pool.info().unwrap().uuid;
    drop(
        pool.create("old", MIB2, NamespaceOptions::default())
            .unwrap(),
    );
    drop(pool);
    world.take_out(without);
    world.light(rng.u64(0..30));
    let options = FormatOptions {
        entries: 12,
        overwrite: true,
        ..FormatOptions::default()
    };
    let made = Pool::format(world.host(0, Coherence::Hardware), options);
    let done = made.is_ok();
    drop(made);
    let left = world.after_crash([0.0, 0.5, 1.0][rng.usize(0..3)], seed);
    left.take_out(None);
    match Pool::open(left.host(0, Coherence::Hardware), Role::Reader) {
        Ok(pool) => {
            let is_old = pool.info().unwrap().uuid == old;
            let report = pool.check();
            let whole = if is_old {
                pool.attach("old").is_ok()
            } else {
                pool.list().unwrap().is_empty()
            };
            // Of a pool that is being made, the second copy may be missing.
            let mended = report
                .problems
                .iter()
                .all(directcxl::Problem::can_be_mended);
            if !whole || !mended || done && (is_old || !report.is_ok()) {
                return Err(format!("seed {seed}: {report:?}"));
            }
            Ok(())
        }
        Err(Error::NotAPool { .. } | Error::Corrupt { .. }) if !done => {
            // Neither pool: and nothing of the old one is taken for one later.
            let pool = Pool::format(
                left.host(0, Coherence::Hardware),
                FormatOptions {
                    overwrite: true,
                    ..FormatOptions::default()
                },
            );
            let pool = pool.map_err(|why| format!("seed {seed}: {why}"))?;
            if pool.list().unwrap().is_empty() {
                Ok(())
            } else {
                Err(format!("seed {seed}"))
            }
        }
        Err(why) => Err(format!("seed {seed}: {why}")),
    }
}

#[test]
fn formatting_over_a_pool_leaves_the_old_one_the_new_one_or_none() {
    let first = carlsbad_kit::seed::rng("format").u64(..) >> 1;
    for i in 0..cases(1_000) as u64 {
        format_case(first + i, None).unwrap();
    }
    for without in [
        Step::SuperblockFirst,
        Step::SuperblockSecond,
        Step::RecordFirst,
    ] {
        let fails = (0..2000).any(|seed| {
            catch_unwind(AssertUnwindSafe(|| {
                format_case(seed, Some(without)).is_err()
            }))
            .unwrap_or(true)
        });
        assert!(fails, "nothing was wrong without {without:?}");
    }
}

/// Allocations whose places are in roots, over a crash.
fn heap_case(seed: u64, without: Option<Step>) -> Result<(), String> {
    let mut rng = Rng::with_seed(seed);
    let (world, pool) = format(seed, None);
    let namespace = pool
        .create("heap", MIB2, NamespaceOptions::default())
        .unwrap();
    let options = HeapOptions {
        smallest: ByteSize::kib(16),
    };
    let heap = Heap::format(&namespace, options).unwrap();
    world.take_out(without);
    world.light(rng.u64(0..120));
    // By root, what was said to be there; and the root whose change was not finished.
    let mut held = [0u64; 6];
    let mut unfinished = None;
    while !world.has_stopped() {
        let i = rng.usize(0..6);
        let root = heap.root(i).unwrap();
        unfinished = Some(i);
        let done = if held[i] == 0 {
            let size = ByteSize::kib(rng.u64(1..200));
            heap.allocate_into(size, root).map(|place| {
                held[i] = place.0;
                unfinished = None;
                // A program's own bytes, where a free list was or will be.
                let _stopped = namespace
                    .write(place.0, &[0xab; 16])
                    .and_then(|()| namespace.publish(place.0..place.0 + 16));
            })
        } else {
            heap.free_from(root).map(|()| {
                held[i] = 0;
                unfinished = None;
            })
        };
        match done {
            Ok(()) | Err(Error::Removed { .. }) => {}
            Err(Error::NoRoom { .. }) => unfinished = None,
            Err(why) => return Err(format!("seed {seed}: {why}")),
        }
    }
    let left = world.after_crash([0.0, 0.5, 1.0][rng.usize(0..3)], seed);
    left.take_out(None);
    let pool = Pool::open(
        left.host(0, Coherence::Hardware),
        Role::Writer(Epoch::CURRENT),
    )
    .unwrap();
    let namespace = pool.attach("heap").unwrap();
    let heap = Heap::open(&namespace).map_err(|why| format!("seed {seed}: {why}"))?;
    let stats = heap.check().map_err(|why| format!("seed {seed}: {why}"))?;
    let mut used = 0;
    let mut places = Vec::new();
    for (i, expected) in held.into_iter().enumerate() {
        let mut bytes = [0; 8];
        namespace.read(heap.root(i).unwrap().0, &mut bytes).unwrap();
        let place = u64::from_le_bytes(bytes);
        // The change that was not finished may have happened; every other root is as it was.
        if place != expected && unfinished != Some(i) {
            return Err(format!("seed {seed}: root {i} is {place:#x}"));
        }
        if place != 0 {
            used += heap
                .length_of(Place(place))
                .map_err(|why| format!("seed {seed}: {why}"))?
                .get();
            places.push(place);
        }
    }
    places.sort_unstable();
    places.dedup();
    if places.len() as u64 != stats.blocks || used != stats.used.get() {
        return Err(format!(
            "seed {seed}: {places:x?} are not the blocks of {stats:?}"
        ));
    }
    // And it goes on from there.
    heap.allocate(ByteSize::new(1))
        .map(drop)
        .or_else(|why| match why {
            Error::NoRoom { .. } => Ok(()),
            why => Err(format!("seed {seed}: {why}")),
        })
}

#[test]
fn no_block_is_lost_or_given_twice_whatever_lines_a_crash_keeps() {
    let first = carlsbad_kit::seed::rng("heap crash").u64(..) >> 1;
    for i in 0..cases(3_000) as u64 {
        heap_case(first + i, None).unwrap();
    }
}

/// The control.
#[test]
fn a_crash_damages_a_heap_where_a_flush_is_left_out() {
    for without in [Step::RedoRecord, Step::RedoApplied] {
        let fails = (0..3000).any(|seed| {
            catch_unwind(AssertUnwindSafe(|| heap_case(seed, Some(without)).is_err()))
                .unwrap_or(true)
        });
        assert!(fails, "nothing was damaged without {without:?}");
    }
}
