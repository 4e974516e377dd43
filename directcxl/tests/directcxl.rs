//! The command-line tool, as a user runs it; and a namespace mapped by another language.
#![cfg(feature = "cli")]
#![allow(
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test says what went wrong by failing"
)]

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

struct Shell {
    dir: tempfile::TempDir,
}

impl Shell {
    fn new() -> Self {
        Self {
            dir: carlsbad_kit::scratch::on_tmpfs().unwrap(),
        }
    }

    fn pool(&self) -> PathBuf {
        self.dir.path().join("pool")
    }

    /// Runs the tool, which must end with `code`. `POOL` stands for the pool's path.
    fn run(&self, code: i32, arguments: &str) -> Output {
        let pool = self.pool().display().to_string();
        let words = arguments.split(' ').map(|word| match word {
            "POOL" => pool.as_str(),
            word => word,
        });
        let output = Command::new(env!("CARGO_BIN_EXE_directcxl"))
            .args(words)
            .output()
            .unwrap();
        assert_eq!(
            output.status.code(),
            Some(code),
            "directcxl {arguments}\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        output
    }

    fn json(&self, arguments: &str) -> Value {
        serde_json::from_slice(&self.run(0, &format!("--json {arguments}")).stdout).unwrap()
    }

    fn error(&self, code: i32, arguments: &str) -> String {
        let output = self.run(code, &format!("--json {arguments}"));
        let error: Value = serde_json::from_slice(&output.stderr).unwrap();
        assert!(!error["error"].as_str().unwrap().is_empty());
        error["kind"].as_str().unwrap().to_owned()
    }
}

#[test]
fn a_pool_from_format_to_remove() {
    let shell = Shell::new();
    let made = shell.json("format POOL --size 32M --hosts 2");
    assert_eq!(made["length"], 32 << 20);
    assert_eq!(shell.error(4, "format POOL"), "not_allowed");
    let created = shell.json("create POOL weights 3M");
    assert_eq!(created["length"], 4 << 20);
    shell.run(0, "create POOL index 2M");
    assert_eq!(shell.error(1, "create POOL index 2M"), "failed");
    assert_eq!(shell.error(5, "create POOL huge 1G"), "no_room");
    let list = shell.json("list POOL");
    assert_eq!(list["namespaces"][0]["name"], "index");
    assert_eq!(list["namespaces"][1]["generation"], created["generation"]);
    let text = String::from_utf8(shell.run(0, "list POOL").stdout).unwrap();
    assert!(text.contains("weights") && text.contains("4 MiB"), "{text}");
    assert_eq!(shell.json("resize POOL weights 2M")["length"], 2 << 20);
    assert_eq!(shell.json("remove POOL weights")["quarantined"], 0);
    assert_eq!(shell.error(3, "remove POOL weights"), "no_such_thing");
    assert_eq!(shell.error(4, "--host 1 create POOL x 2M"), "not_allowed");
    shell.run(0, "--host 1 --epoch 2 create POOL x 2M");
    assert_eq!(shell.json("list POOL")["writer"], 1);
    assert_eq!(shell.json("--host 1 evict POOL 0")["evicted"], 0);
    assert_eq!(shell.json("check POOL")["ok"], true);
    assert_eq!(shell.error(3, "list /nowhere"), "no_such_thing");
    assert_eq!(shell.error(2, "list"), "bad_usage");
}

#[test]
fn a_damaged_copy_is_shown_and_mended() {
    let shell = Shell::new();
    shell.run(0, "format POOL --size 16M");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(shell.pool())
        .unwrap();
    file.write_all_at(&[0xff; 16], 4096 + 40).unwrap();
    let output = shell.run(7, "--json check POOL");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["problems"][0]["can_be_mended"], true);
    assert_eq!(shell.json("check POOL --repair")["mended"], 1);
    assert_eq!(shell.json("check POOL")["ok"], true);
}

#[test]
fn a_message_says_its_reason_once() {
    let shell = Shell::new();
    let failed = shell.run(3, "list POOL");
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(said.matches("No such file").count(), 1, "{said}");
}

/// It said "No space left on device", of which one it did not say.
#[test]
fn a_full_standard_output_is_said_to_be_that_and_what_is_done_is_said_to_be_done() {
    let shell = Shell::new();
    shell.run(0, "format POOL --size 32M");
    let pool = shell.pool().display().to_string();
    let full = |arguments: &[&str]| {
        let full = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_directcxl"))
            .args(arguments)
            .stdout(full)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = full(&["list", &pool]);
    assert!(said.contains("cannot write to standard output"), "{said}");
    assert_eq!(said.matches("No space left").count(), 1, "{said}");
    assert!(!said.contains("done"), "{said}");
    let said = full(&["create", &pool, "a", "2M"]);
    assert!(said.contains("what was asked for is done"), "{said}");
    assert_eq!(shell.json("list POOL")["namespaces"][0]["name"], "a");
    let said = full(&["--json", "remove", &pool, "a"]);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["kind"], "failed");
    assert!(full(&["--help"]).contains("cannot write to standard output"));
}

#[test]
fn a_reader_that_has_seen_enough_ends_it_without_a_word() {
    let shell = Shell::new();
    shell.run(0, "format POOL --size 32M");
    shell.run(0, "create POOL a 2M");
    for arguments in ["list", "check", "--help"] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_directcxl"))
            .arg(arguments)
            .arg(shell.pool())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{arguments}: {}", output.status);
        assert!(output.stderr.is_empty(), "{arguments}");
    }
}

/// What waits for another process can be interrupted, and has changed nothing then.
#[test]
fn an_interrupt_ends_it_at_once_and_leaves_the_pool_as_it_was() {
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::sys::signal::{Signal, kill};
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    let shell = Shell::new();
    shell.run(0, "format POOL --size 32M");
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(shell.pool())
        .unwrap();
    // The lock on the log, as `layout` has it.
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 1 << 62,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_directcxl"));
        command.arg("create").arg(shell.pool()).args(["a", "2M"]);
        // Whoever starts the tests may ignore signals, as shells do for what runs in the background.
        let by_default = move || {
            // SAFETY: the default action has no handler.
            unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) }?;
            Ok(())
        };
        // SAFETY: one call of the kernel's.
        unsafe { command.pre_exec(by_default) };
        let mut child = command.spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(child.try_wait().unwrap().is_none());
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
        kill(pid, signal).unwrap();
        let asked = std::time::Instant::now();
        assert_eq!(child.wait().unwrap().signal(), Some(signal as i32));
        assert!(asked.elapsed() < std::time::Duration::from_secs(2));
    }
    drop(file);
    assert_eq!(shell.json("list POOL")["namespaces"], Value::Array(vec![]));
    assert_eq!(shell.json("check POOL")["ok"], true);
    shell.run(0, "create POOL a 2M");
}

#[test]
fn a_host_that_evicts_itself_is_told_that_it_is_alive() {
    let shell = Shell::new();
    shell.run(0, "format POOL --size 64M --hosts 2");
    let failed = shell.run(4, "evict POOL 0");
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(said.contains("is this host"), "{said}");
    shell.run(1, "evict POOL 2");
    shell.run(0, "evict POOL 1");
}

#[test]
fn a_file_that_is_too_small_for_a_pool_is_not_left_behind() {
    let shell = Shell::new();
    shell.run(1, "format POOL --size 2M");
    assert!(!shell.pool().exists());
    shell.run(0, "format POOL --size 64M");
}

/// `check` said to run `check`, and nothing else.
#[test]
fn check_lists_what_is_left_of_a_damaged_pool() {
    let shell = Shell::new();
    shell.run(0, "format POOL --size 32M");
    for name in ["a", "b", "c"] {
        shell.run(0, &format!("create POOL {name} 4M"));
    }
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(shell.pool())
        .unwrap();
    let entry = (2 << 20) + 65536 + 3968 * 256 + 256;
    file.write_all_at(&[0xff; 256], entry).unwrap();
    // A mark where "c" has its bytes.
    file.write_all_at(b"these", 12 << 20).unwrap();
    assert_eq!(shell.error(7, "list POOL"), "damaged");
    for arguments in ["check POOL", "check POOL --repair"] {
        let said = shell.run(7, arguments).stdout;
        let said = String::from_utf8_lossy(&said).into_owned();
        for words in [
            "entry 1 of the log is lost",
            "cannot mend",
            "skip=6 count=2",
        ] {
            assert!(said.contains(words), "{said}");
        }
    }
    let output = shell.run(7, "--json check POOL");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let left = report["salvage"].as_array().unwrap();
    assert_eq!(left.len(), 2);
    assert_eq!(
        (&left[0]["name"], &left[0]["certain"]),
        (&"a".into(), &false.into())
    );
    assert_eq!(
        (&left[1]["name"], &left[1]["certain"]),
        (&"c".into(), &true.into())
    );
    // As it says: the bytes are there.
    let copied = Command::new("dd")
        .arg(format!("if={}", shell.pool().display()))
        .args(["bs=2M", "skip=6", "count=2", "status=none"])
        .output()
        .unwrap();
    assert!(copied.stdout.len() == 4 << 20 && copied.stdout.starts_with(b"these"));
}

/// The size was ignored.
#[test]
fn a_size_is_for_a_file_that_is_not_there() {
    let shell = Shell::new();
    std::fs::File::create(shell.pool())
        .unwrap()
        .set_len(32 << 20)
        .unwrap();
    let failed = shell.run(1, "format POOL --size 64M");
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(said.contains("leave out --size"), "{said}");
    // What a format that was killed has left is finished.
    shell.run(0, "format POOL --size 32M");
}

/// What lies where was guessed from its path.
#[test]
fn a_file_is_a_file_wherever_it_lies() {
    let shell = Shell::new();
    shell.run(0, "format POOL --size 16M");
    let other = format!("/dev/..{}", shell.pool().display());
    assert_eq!(shell.json(&format!("list {other}"))["hosts"], 1);
    let failed = shell.run(1, "list /dev/dax99.9");
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(said.contains("no such DAX device"), "{said}");
}

#[test]
fn a_machine_without_cxl_is_told_what_it_can_do() {
    let shell = Shell::new();
    let empty = shell.dir.path().display().to_string();
    let text = String::from_utf8(shell.run(0, &format!("scan --sysfs {empty}")).stdout).unwrap();
    assert!(text.contains("directcxl format"), "{text}");
    assert_eq!(
        shell.json(&format!("scan --sysfs {empty}"))["memdevs"],
        Value::Array(vec![])
    );
    assert_eq!(
        shell.error(6, &format!("plan --sysfs {empty}")),
        "unavailable"
    );
    assert_eq!(
        shell.error(6, &format!("destroy region0 --sysfs {empty}")),
        "unavailable"
    );
}

/// The mapping is an ordinary one: Python's own mmap module reads and writes it.
#[test]
fn a_stock_python_maps_a_namespace() {
    if Command::new("python3").arg("--version").output().is_err() {
        eprintln!("SKIPPED python3: apt install python3");
        return;
    }
    let shell = Shell::new();
    shell.run(0, "format POOL --size 16M");
    let made = shell.json("create POOL a 2M");
    let script = "
import mmap, sys
offset, length = int(sys.argv[2]), int(sys.argv[3])
with open(sys.argv[1], 'r+b') as f:
    m = mmap.mmap(f.fileno(), length, offset=offset)
    assert m[:8] == bytes(8)
    m[100:105] = b'hello'
";
    let status = Command::new("python3")
        .args(["-c", script])
        .arg(shell.pool())
        .args([made["offset"].to_string(), made["length"].to_string()])
        .status()
        .unwrap();
    assert!(status.success());
    let file = directcxl::FileHdm::open_read_only(shell.pool()).unwrap();
    let pool = directcxl::Pool::open(file, directcxl::Role::Reader).unwrap();
    let mut bytes = [0; 5];
    pool.attach("a").unwrap().read(100, &mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
}

/// A pool may lie anywhere; a name is text.
#[test]
fn names_that_are_no_text_are_refused_and_paths_are_not() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let shell = Shell::new();
    let pool = shell.dir.path().join(OsStr::from_bytes(b"p\xff"));
    let run = |words: &[&OsStr]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_directcxl"));
        command.args(words).output().unwrap()
    };
    let text = OsStr::new;
    let format = [
        text("format"),
        pool.as_os_str(),
        text("--size"),
        text("32M"),
    ];
    assert!(run(&format).status.success());
    for command in ["create", "remove"] {
        let name = OsStr::from_bytes(b"n\xff");
        let mut words = vec![text(command), pool.as_os_str(), name];
        if command == "create" {
            words.push(text("2M"));
        }
        let refused = run(&words);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("UTF-8"));
    }
    let list = run(&[text("list"), pool.as_os_str()]);
    assert!(list.status.success(), "{list:?}");
}
