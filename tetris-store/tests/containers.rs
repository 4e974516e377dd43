//! Containers for real: namespaces of their own, other users, the store mounted read-only.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{self, Child, Role};
use carlsbad_kit::require;
use common::{MemoryModel, scratch};
use tetris_store::{Error, IngestOptions, Store, StoreConfig};

const KEEP_ALIVE: Duration = Duration::from_millis(300);

fn model() -> MemoryModel {
    MemoryModel::default()
        .with_random("large", 4 << 20, 1)
        .with_random("small", 100, 2)
}

#[test]
#[ignore = "a role of the test below"]
fn role_container() {
    let Some(root) = child::arguments::<PathBuf>("role_container") else {
        return;
    };
    let store = Store::open(StoreConfig::at(&root)).unwrap();
    let model = model();
    let shared = store.attach(&store.resolve("m").unwrap()).unwrap();
    for name in ["large", "small"] {
        assert!(shared.tensor(name).unwrap().bytes == model.bytes_of(name));
    }
    // It can look, and nothing else.
    assert!(matches!(store.ingest(&model), Err(Error::ReadOnly { .. })));
    assert!(matches!(store.reclaim(), Err(Error::ReadOnly { .. })));
    assert!(fs::write(root.join("models/x"), "").is_err());
    let object = shared.manifest().tensor("large").unwrap().object;
    let path = store.object_path(&object).unwrap();
    assert!(fs::OpenOptions::new().write(true).open(&path).is_err());

    let file = fs::metadata(path).unwrap();
    child::tell(format!(
        "attached {} {} {}",
        file.ino(),
        std::process::id(),
        nix::unistd::getuid()
    ));
    child::wait_for_parent();
    assert!(shared.tensor("large").unwrap().bytes == model.bytes_of("large"));
    child::tell("still whole");
    child::wait_for_parent();
}

/// Mounts the store read-only where only this mount namespace sees it, then runs the role.
const IN_CONTAINER: &str = r#"
    mount --make-rprivate / &&
    mount --bind "$STORE" "$SEEN" &&
    mount -o remount,bind,ro,nosuid,nodev "$SEEN" &&
    role="$1" && shift 2 && exec "$role" "$@""#;

fn container(dir: &std::path::Path, role: &str, uid: u32) -> Child {
    let seen = dir.join("seen");
    // A copy that every user can run, wherever the build directory is.
    let arguments: &[&str] = &[
        "--user",
        "--map-root-user",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        IN_CONTAINER,
        "container",
        role,
    ];
    let uid = uid.to_string();
    let started = if nix::unistd::getuid().is_root() {
        let mut all = vec![
            "--reuid",
            &uid,
            "--regid",
            &uid,
            "--clear-groups",
            "unshare",
        ];
        all.extend_from_slice(arguments);
        Role::test("role_container").by("setpriv", &all)
    } else {
        Role::test("role_container").by("unshare", arguments)
    };
    started
        .env("STORE", dir.join("store").to_str().unwrap())
        .env("SEEN", seen.to_str().unwrap())
        .start(&seen)
        .unwrap()
}

#[test]
fn containers_share_lease_die_and_let_go() {
    require!(Capability::Namespaces);
    let dir = scratch();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(dir.path().join("seen")).unwrap();
    let role = dir.path().join("role");
    fs::copy(std::env::current_exe().unwrap(), &role).unwrap();
    let role = role.to_str().unwrap();

    let mut config = StoreConfig::at(dir.path().join("store"));
    config.keep_alive = KEEP_ALIVE;
    let store = Store::open(config).unwrap();
    let options = IngestOptions {
        label: Some("m"),
        ..Default::default()
    };
    let id = store.ingest_with(&model(), &options).unwrap().model;
    let object = store.manifest(&id).unwrap().tensor("large").unwrap().object;
    let stored = fs::metadata(store.object_path(&object).unwrap()).unwrap();

    let mut first = container(dir.path(), role, 61_001);
    let mut second = container(dir.path(), role, 61_002);
    for container in [&first, &second] {
        let words = container.hear("attached").unwrap();
        let words: Vec<u64> = words.split(' ').map(|word| word.parse().unwrap()).collect();
        assert_eq!(words[0], stored.ino(), "it maps the very same pages");
        assert!(words[1] < 10, "a PID namespace of its own");
    }
    std::thread::sleep(KEEP_ALIVE * 2);
    let report = store.reclaim().unwrap();
    assert_eq!((report.leased, report.freed.len()), (1, 0));

    first.kill();
    std::thread::sleep(KEEP_ALIVE * 2);
    let report = store.reclaim().unwrap();
    assert_eq!(
        (report.leased, report.freed.len()),
        (1, 0),
        "the second one still has it"
    );
    second.say("look again").unwrap();
    second.hear("still whole").unwrap();

    second.kill();
    let killed = Instant::now();
    loop {
        let report = store.reclaim().unwrap();
        if report.freed == [id] {
            break;
        }
        assert!(
            killed.elapsed() < KEEP_ALIVE + Duration::from_secs(1),
            "{report:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(killed.elapsed() >= KEEP_ALIVE, "freed early");
    assert_eq!(store.stats().unwrap().objects, 0);
}
