//! Control groups: leased once, limited, killed with their lease, and swept after their owner.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(
    clippy::zombie_processes,
    reason = "what is left behind is what is tested"
)]

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{self, Role};
use carlsbad_types::ByteSize;
use rund_rt::cgroup::{CgroupPool, Claim, Controller, Hierarchy, PoolConfig, Version, sweep};
use rund_rt::{Error, Limits};

const PATIENCE: Duration = Duration::from_secs(30);

fn config(name: &str) -> PoolConfig {
    let mut config = PoolConfig::default();
    config.name = name.to_owned();
    config.ready = 4;
    config.capacity = 16;
    config.patience = PATIENCE;
    config
}

fn limits(memory: u64) -> Limits {
    let mut limits = Limits::default();
    limits.memory = Some(ByteSize::mib(memory));
    limits.cpus = Some(0.5);
    limits.processes = Some(40);
    limits
}

fn sleeper() -> Child {
    Command::new("sleep")
        .arg("1000")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Directories of pools called `name`, in every tree.
fn pools_called(hierarchy: &Hierarchy, name: &str) -> Vec<PathBuf> {
    let probe = CgroupPool::new(hierarchy.clone(), config("probe")).unwrap();
    let lease = probe.lease(&Limits::default()).unwrap();
    let mut found = HashSet::new();
    for controller in Controller::ALL {
        let Some(path) = lease.path(controller) else {
            continue;
        };
        let base = path.parent().and_then(Path::parent).unwrap();
        for entry in std::fs::read_dir(base).unwrap().flatten() {
            if entry
                .file_name()
                .to_string_lossy()
                .starts_with(&format!("{name}."))
            {
                found.insert(entry.path());
            }
        }
    }
    found.into_iter().collect()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// The hierarchy, where it can limit memory; a test of limits has nothing to test elsewhere.
fn limiting() -> Option<Hierarchy> {
    let hierarchy = Hierarchy::detect().unwrap();
    if hierarchy.has(Controller::Memory) && hierarchy.has(Controller::Pids) {
        return Some(hierarchy);
    }
    // Past the capture of the test harness: a skip that nobody sees is a lie.
    let _nobody_listens = std::io::Write::write_all(
        &mut std::io::stderr(),
        b"SKIPPED memory controller: mount or delegate it\n",
    );
    None
}

#[test]
fn a_lease_has_its_limits_in_force() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    let Some(hierarchy) = limiting() else { return };
    let mut config = config("limits");
    config.limits = limits(32);
    let pool = CgroupPool::new(hierarchy, config).unwrap();
    for memory in [32, 64, 16] {
        let lease = pool.lease(&limits(memory)).unwrap();
        let now = lease.in_force().unwrap();
        assert_eq!(now.memory, Some(ByteSize::mib(memory)));
        assert_eq!(now.pids, Some(40));
        assert_eq!(now.cpus, Some(0.5));
        if let Some(both) = now.memory_and_swap {
            assert_eq!(both, ByteSize::mib(memory));
        }
    }
    let mut free = pool.lease(&Limits::default()).unwrap();
    let now = free.in_force().unwrap();
    assert_eq!((now.memory, now.pids, now.cpus), (None, None, None));
    free.set(&limits(48)).unwrap();
    assert_eq!(free.in_force().unwrap().memory, Some(ByteSize::mib(48)));
}

#[test]
fn a_limit_that_nothing_enforces_is_refused() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    let hierarchy = Hierarchy::detect()
        .unwrap()
        .only(&[Controller::Freezer, Controller::Pids]);
    let pool = CgroupPool::new(hierarchy, config("unenforced")).unwrap();
    let refused = pool.lease(&limits(32)).unwrap_err();
    assert!(
        matches!(refused, Error::NoController { what: "memory", .. }),
        "{refused}"
    );
    // The slot of the refused lease does not count as leased.
    assert_eq!(pool.stats().leased, 0);
}

#[test]
fn an_exhausted_pool_is_a_typed_error_within_its_deadline() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    let mut config = config("exhausted");
    (config.ready, config.capacity) = (1, 2);
    let pool = CgroupPool::new(Hierarchy::detect().unwrap(), config).unwrap();
    let none = Limits::default();
    let first = pool.lease(&none).unwrap();
    let _second = pool.lease(&none).unwrap();
    let start = Instant::now();
    let refused = pool
        .lease_as("third", &none, Duration::from_millis(50))
        .unwrap_err();
    assert!(matches!(refused, Error::PoolExhausted { .. }), "{refused}");
    assert!(start.elapsed() >= Duration::from_millis(50));
    // Who waits gets the group that replaces one that came back.
    thread::scope(|scope| {
        let waits = scope.spawn(|| pool.lease(&none));
        thread::sleep(Duration::from_millis(20));
        drop(first);
        waits.join().unwrap().unwrap();
    });
}

#[test]
fn names_are_unique_while_they_live_and_hostile_ones_are_refused() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    let pool = CgroupPool::new(Hierarchy::detect().unwrap(), config("names")).unwrap();
    let none = Limits::default();
    let lease = pool.lease_as("one", &none, PATIENCE).unwrap();
    let again = pool.lease_as("one", &none, PATIENCE).unwrap_err();
    assert!(matches!(again, Error::DuplicateId { .. }), "{again}");
    lease.close(PATIENCE).unwrap();
    pool.lease_as("one", &none, PATIENCE).unwrap();
    for bad in ["..", "a/../../b", "", "x\0"] {
        assert!(matches!(
            pool.lease_as(bad, &none, PATIENCE),
            Err(Error::BadSetting { .. })
        ));
    }
}

#[test]
fn the_papers_rename_is_a_policy_of_version_1() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    let mut config = config("rename");
    config.claim = Claim::Rename;
    if let Ok(hierarchy) = Hierarchy::v2() {
        let refused = CgroupPool::new(hierarchy, config.clone()).unwrap_err();
        assert!(matches!(refused, Error::BadSetting { .. }), "{refused}");
    }
    let Ok(hierarchy) = Hierarchy::v1() else {
        return;
    };
    let pool = CgroupPool::new(hierarchy, config).unwrap();
    let lease = pool
        .lease_as("box-7", &Limits::default(), PATIENCE)
        .unwrap();
    for controller in Controller::ALL {
        let Some(path) = lease.path(controller) else {
            continue;
        };
        assert!(
            path.ends_with("box-7") && path.is_dir(),
            "{}",
            path.display()
        );
    }
}

#[test]
fn a_lease_that_ends_kills_its_members_and_is_never_leased_again() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    for hierarchy in [Hierarchy::v1(), Hierarchy::v2()].into_iter().flatten() {
        let version = hierarchy.version();
        let pool = CgroupPool::new(hierarchy, config("single-use")).unwrap();
        let lease = pool.lease(&Limits::default()).unwrap();
        assert_eq!(lease.version(), version);
        let path = lease.path(Controller::Freezer).unwrap();
        let mut member = sleeper();
        lease.add(member.id()).unwrap();
        assert_eq!(lease.members().unwrap(), [member.id() as i32]);
        drop(lease);
        member.wait().unwrap();
        wait_until("the group is removed", || !path.exists());
        let next = pool.lease(&Limits::default()).unwrap();
        assert_ne!(next.path(Controller::Freezer).unwrap(), path);
        assert!(next.members().unwrap().is_empty());
    }
}

#[test]
fn a_frozen_group_stands_still_and_dies_all_the_same() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    for hierarchy in [Hierarchy::v1(), Hierarchy::v2()].into_iter().flatten() {
        let pool = CgroupPool::new(hierarchy, config("freezer")).unwrap();
        let lease = pool.lease(&Limits::default()).unwrap();
        let mut member = Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .unwrap();
        lease.add(member.id()).unwrap();
        let ticks = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", member.id())).unwrap();
            stat.split(' ').nth(13).unwrap().parse::<u64>().unwrap()
        };
        wait_until("it runs", || ticks() > 0);
        lease.freeze(PATIENCE).unwrap();
        let then = ticks();
        thread::sleep(Duration::from_millis(100));
        assert_eq!(ticks(), then);
        lease.thaw().unwrap();
        wait_until("it runs again", || ticks() > then);
        lease.freeze(PATIENCE).unwrap();
        lease.close(PATIENCE).unwrap();
        member.wait().unwrap();
    }
}

#[test]
#[ignore = "a role of `the_oom_of_one_group_spares_its_neighbours`"]
fn role_eater() {
    let Some(megabytes) = child::arguments::<usize>("role_eater") else {
        return;
    };
    child::tell("ready");
    child::wait_for_parent();
    let mut eaten = Vec::new();
    for _ in 0..megabytes {
        eaten.push(vec![1u8; 1 << 20]);
    }
    child::tell(format!("ate {}", std::hint::black_box(&eaten).len()));
    child::wait_for_parent();
}

#[test]
fn the_oom_of_one_group_spares_its_neighbours() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    let Some(hierarchy) = limiting() else { return };
    let pool = CgroupPool::new(hierarchy, config("oom")).unwrap();
    let mut boxes: Vec<_> = [8, 200, 8]
        .into_iter()
        .map(|megabytes| {
            let lease = pool.lease(&limits(48)).unwrap();
            let eater = Role::test("role_eater").start(&megabytes).unwrap();
            eater.hear("ready").unwrap();
            lease.add(eater.id()).unwrap();
            (lease, eater)
        })
        .collect();
    for (_, eater) in &mut boxes {
        eater.say("eat").unwrap();
    }
    assert!(!boxes[1].1.wait().unwrap().success());
    for neighbour in [0, 2] {
        assert_eq!(boxes[neighbour].1.hear("ate").unwrap(), "8");
        let usage = boxes[neighbour].0.usage().unwrap();
        assert_eq!(usage.oom_kills, Some(0));
        assert!(usage.memory_peak.unwrap() >= ByteSize::mib(7));
    }
    // Version 2 ends a whole group at once, and counts the first that it chose twice.
    let kills = boxes[1].0.usage().unwrap().oom_kills;
    let expected = match boxes[1].0.version() {
        Version::V1 => 1..=1,
        Version::V2 => 1..=2,
    };
    assert!(expected.contains(&kills.unwrap()), "{kills:?}");
}

#[test]
fn two_hundred_threads_lease_groups_of_their_own() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    let mut config = config("threads");
    (config.ready, config.capacity) = (32, 400);
    let pool = CgroupPool::new(Hierarchy::detect().unwrap(), config).unwrap();
    let names = thread::scope(|scope| {
        let threads: Vec<_> = (0..200)
            .map(|_| scope.spawn(|| pool.lease(&Limits::default()).unwrap()))
            .collect();
        let leases: Vec<_> = threads.into_iter().map(|one| one.join().unwrap()).collect();
        let path = |lease: &rund_rt::cgroup::CgroupLease| lease.path(Controller::Pids).unwrap();
        leases.iter().map(path).collect::<HashSet<_>>()
    });
    assert_eq!(names.len(), 200);
}

#[test]
fn cycles_of_leases_leave_no_group_and_no_descriptor() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    let cycles = if std::env::var_os("CARLSBAD_SOAK").is_some() {
        10_000
    } else {
        300
    };
    let hierarchy = Hierarchy::detect().unwrap();
    {
        let pool = CgroupPool::new(hierarchy.clone(), config("cycles")).unwrap();
        let mut outlives = None;
        for round in 0..cycles {
            let lease = pool.lease(&Limits::default()).unwrap();
            if round % 16 == 0 {
                let mut member = sleeper();
                lease.add(member.id()).unwrap();
                drop(lease);
                member.wait().unwrap();
            } else if round == 1 {
                outlives = Some(lease);
            }
        }
        assert_eq!(pool.stats().leases, cycles);
        drop(pool);
        drop(outlives);
    }
    assert_eq!(pools_called(&hierarchy, "cycles"), [] as [PathBuf; 0]);
}

#[test]
#[ignore = "a role of `what_a_killed_owner_leaves_is_swept`"]
fn role_owner() {
    let Some(member_outlives) = child::arguments::<bool>("role_owner") else {
        return;
    };
    let pool = CgroupPool::new(Hierarchy::detect().unwrap(), config("killed")).unwrap();
    let lease = pool.lease(&Limits::default()).unwrap();
    let member = if member_outlives {
        sleeper()
    } else {
        // Ends with its input, also where we are killed before it is in the group.
        let mut command = Command::new("cat");
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        command.spawn().unwrap()
    };
    lease.add(member.id()).unwrap();
    pool.wait_filled(PATIENCE);
    child::tell(format!("member {}", member.id()));
    child::wait_for_parent();
}

#[test]
fn what_a_killed_owner_leaves_is_swept() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    let hierarchy = Hierarchy::detect().unwrap();
    let mut owner = Role::test("role_owner").start(&true).unwrap();
    let member = owner.hear("member").unwrap();
    let member = PathBuf::from(format!("/proc/{member}/exe"));

    // The control: a living owner's groups are not swept, nor is its sandbox killed.
    sweep(&hierarchy).unwrap();
    assert!(!pools_called(&hierarchy, "killed").is_empty());
    assert!(member.read_link().is_ok());

    owner.kill();
    // Tests beside this one make pools, and each begins with a sweep: who sweeps does not matter.
    wait_until("everything is swept", || {
        sweep(&hierarchy).unwrap();
        pools_called(&hierarchy, "killed").is_empty()
    });
    wait_until("the member is gone", || member.read_link().is_err());
}

#[test]
fn an_owner_killed_at_any_moment_leaves_nothing() {
    carlsbad_kit::require!(Capability::Root, Capability::ControlGroups);
    let times = if std::env::var_os("CARLSBAD_SOAK").is_some() {
        300
    } else {
        12
    };
    let hierarchy = Hierarchy::detect().unwrap();
    let mut rng = carlsbad_kit::seed::rng("owner killed");
    child::kill_at_random(
        &mut rng,
        times,
        Duration::from_millis(60),
        |_| Role::test("role_owner").start(&false),
        |_| {},
    )
    .unwrap();
    wait_until("everything is swept", || {
        sweep(&hierarchy).unwrap();
        pools_called(&hierarchy, "killed").is_empty()
    });
}

#[test]
fn where_no_group_can_be_made_the_error_says_so() {
    if Capability::ControlGroups.is_present() {
        return;
    }
    // A person without rights, or a machine without control groups.
    let pool = Hierarchy::detect().and_then(|found| CgroupPool::new(found, config("nobody")));
    let refused = pool.unwrap_err();
    let typed = matches!(refused, Error::Cgroup { .. } | Error::NoController { .. });
    assert!(typed, "{refused}");
}
