//! Guests that make processes and become other programs.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use rund_rt::{CloneSpec, Output, Status, TemplateSpec};

use common::{BUSYBOX, PATIENCE, busybox, is_slow, root, runtime, shell, text};

/// A script in a clone whose reset is verified: nothing may differ from the template afterwards.
fn verified(template: &rund_rt::Template, runtime: &rund_rt::Runtime, script: &str) -> String {
    let args = ["busybox", "sh", "-c", script];
    let spec = CloneSpec::new().args(args).verify_reset();
    let sandbox = runtime.start(template, spec).unwrap();
    let exit = sandbox.wait(PATIENCE).unwrap();
    if let Some(differences) = sandbox.reset_differences() {
        assert_eq!(differences, Vec::<String>::new(), "after {script:?}");
    }
    text(&exit.stdout)
}

#[test]
fn a_machine_is_the_template_again_after_forks_and_other_programs() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    for (script, expected) in [
        ("exec cat /data/words | head -n 1", "pear\n"),
        ("(echo one); (echo two); :", "one\ntwo\n"),
        ("cat /data/empty; echo $((6 * 7))", "42\n"),
        ("exec sh -c 'exec sh -c \"exec echo three\"'", "three\n"),
        ("trap 'echo gone' EXIT; false | true; exec_not=1", "gone\n"),
    ] {
        assert_eq!(verified(&template, &runtime, script), expected, "{script}");
    }
    // The same machine served all of them, where pages that differ can be found (Linux 6.7).
    let exit = shell(&runtime, &template, "echo five");
    assert_eq!(text(&exit.stdout), "five\n");
    let fresh = shell(&runtime, &template, "cat /proc/self/cmdline | tr '\\0' ' '");
    assert_eq!(fresh.stats.recycled, exit.stats.recycled);
}

#[test]
fn what_is_left_behind_ends_with_the_sandbox() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    // Three generations, all of which would write into whatever comes next.
    let noisy = "while :; do echo late; echo late > /tmp/late; done";
    let script = format!("( ( ({noisy}) & sleep 100 ) & {noisy} ) & usleep 20000; echo done");
    for _ in 0..10 {
        let exit = shell(&runtime, &template, &script);
        assert!(text(&exit.stdout).ends_with("done\n") || text(&exit.stdout).contains("late"));
        let next = shell(&runtime, &template, "usleep 2000; ls /tmp; echo mine");
        assert_eq!(text(&next.stdout), "mine\n");
        assert_eq!(text(&next.stderr), "");
    }
}

#[test]
fn a_childs_end_is_told_as_linux_tells_it() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    for (script, expected) in [
        (
            "(exit 0); echo $?; (exit 7); echo $?; (exit 255); echo $?",
            "0\n7\n255\n",
        ),
        (
            "sh -c 'kill -TERM $$'; echo $?; sh -c 'kill -KILL $$'; echo $?",
            "143\n137\n",
        ),
        ("sleep 100 & kill -KILL $!; wait $!; echo $?", "137\n"),
        ("sleep 100 & kill -TERM $!; wait $!; echo $?", "143\n"),
        (
            "(exit 3) & a=$!; (exit 4) & b=$!; wait $b; echo $?; wait $a; echo $?",
            "4\n3\n",
        ),
        ("trap 'echo child' CHLD; (exit 1); echo $?", "1\nchild\n"),
        ("true & wait; true & wait; wait; echo $?", "0\n"),
        (
            "echo x | (read y; echo $y; exit 5) | cat; echo $?",
            "x\n0\n",
        ),
    ] {
        let exit = shell(&runtime, &template, script);
        let said = text(&exit.stdout);
        let mut said: Vec<_> = said.lines().collect();
        let mut expected: Vec<_> = expected.lines().collect();
        // When a trap runs is the shell's choice.
        if script.contains("trap") {
            said.sort_unstable();
            expected.sort_unstable();
        }
        assert_eq!(said, expected, "{script}: {}", text(&exit.stderr));
    }
}

#[test]
fn many_processes_one_after_the_other_use_nothing_up() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let number = if is_slow() { 40 } else { 150 };
    let script = format!(
        "i=0; while [ $i -lt {number} ]; do (exit 0) || echo no; i=$((i + 1)); done; echo $i"
    );
    let exit = shell(&runtime, &template, &script);
    let expected = format!("{number}\n");
    assert_eq!(text(&exit.stdout), expected, "{}", text(&exit.stderr));
}

/// More programs than there is room for page tables side by side.
#[test]
fn a_process_becomes_many_programs() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let again = "#!/bin/sh\n[ $1 = 0 ] && exec echo end\nexec /data/again $(($1 - 1))\n";
    std::fs::write(root.path().join("data/again"), again).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(root.path().join("data/again"), mode).unwrap();
    let template = busybox(&runtime, root.path());
    for script in [
        "exec /data/again 60",
        "exec /data/again 3",
        "exec /data/again 60",
    ] {
        assert_eq!(verified(&template, &runtime, script), "end\n", "{script}");
    }
}

#[test]
fn a_program_that_the_guest_wrote_runs() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let script = "cp /bin/busybox /tmp/sh && /tmp/sh -c 'echo > /tmp/sh; echo still here'; \
                  printf '#!/bin/sh\\necho script $0 $1\\n' > /tmp/s; chmod +x /tmp/s; /tmp/s one; \
                  echo nonsense > /tmp/n; chmod +x /tmp/n; /tmp/n 2>&1 | grep -c -i 'not found'";
    let exit = shell(&runtime, &template, script);
    assert_eq!(
        text(&exit.stdout),
        "still here\nscript /tmp/s one\n1\n",
        "{}",
        text(&exit.stderr)
    );
}

/// A program that shrinks while it is loaded ends its process; the machine, half exchanged, was taken
/// for the template.
#[test]
fn a_program_that_cannot_be_loaded_leaves_nothing_for_the_next_clone() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let script = "cat /bin/busybox > /tmp/p; chmod +x /tmp/p; \
                  (while :; do : > /tmp/p; cat /bin/busybox > /tmp/p; done) & \
                  exec /tmp/p true";
    for _ in 0..if is_slow() { 4 } else { 60 } {
        let args = ["busybox", "sh", "-c", script];
        let spec = CloneSpec::new().args(args).verify_reset();
        let sandbox = runtime.start(&template, spec).unwrap();
        // However it ends.
        sandbox.wait(PATIENCE).unwrap();
        if let Some(differences) = sandbox.reset_differences() {
            assert_eq!(differences, Vec::<String>::new());
        }
        drop(sandbox);
        let exit = shell(&runtime, &template, "echo fine");
        assert_eq!(text(&exit.stdout), "fine\n");
    }
}

#[test]
fn a_program_given_by_a_relative_path_knows_its_own() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let dir = tempfile::tempdir_in(".").unwrap();
    std::fs::copy(BUSYBOX, dir.path().join("busybox")).unwrap();
    let relative = std::path::Path::new(".").join(dir.path().file_name().unwrap());
    let runtime = runtime();
    let spec = TemplateSpec::new(relative.join("busybox"));
    let template = runtime.prepare(&spec).unwrap();
    let args = ["busybox", "readlink", "/proc/self/exe"];
    let sandbox = runtime
        .start(&template, CloneSpec::new().args(args))
        .unwrap();
    let exit = sandbox.wait(PATIENCE).unwrap();
    assert_eq!(exit.status, Status::Code(0));
    assert!(text(&exit.stdout).starts_with('/'), "{exit:?}");
}

/// The window on a file was laid once, and never again.
#[test]
fn a_file_that_is_read_in_pieces_leaves_the_machine_rarely() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let bytes: Vec<u8> = (0..4u32 << 20).map(|i| (i ^ i >> 9) as u8).collect();
    std::fs::write(root.path().join("data/large"), bytes).unwrap();
    let template = busybox(&runtime, root.path());
    let file = "/data/large";
    let args = ["busybox", "sha256sum", file];
    let sandbox = runtime
        .start(&template, CloneSpec::new().args(args))
        .unwrap();
    let exit = sandbox.wait(PATIENCE).unwrap();
    let host = std::process::Command::new(BUSYBOX)
        .arg("sha256sum")
        .arg(root.path().join("data/large"))
        .output()
        .unwrap();
    assert_eq!(exit.stdout[..64], host.stdout[..64]);
    if exit.stats.served_inside == 0 {
        return; // No shim here: every call leaves the machine.
    }
    // 1,024 calls of 4 KiB.
    assert!(exit.stats.exits < 60, "{} calls left", exit.stats.exits);
    assert!(exit.stats.served_inside > 900, "{:?}", exit.stats);
}

#[test]
fn a_child_that_never_ends_is_not_waited_for() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let began = Instant::now();
    let exit = shell(&runtime, &template, "sleep 1000 & echo here");
    assert_eq!(text(&exit.stdout), "here\n");
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_pause_stops_all_processes_of_a_sandbox() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let script = "for i in 1 2 3; do (while :; do echo tick; usleep 20000; done) & done; wait";
    let spec = CloneSpec::new()
        .args(["busybox", "sh", "-c", script])
        .stdout(Output::Piped);
    let sandbox = runtime.start(&template, spec).unwrap();
    let mut output = sandbox.take_stdout().unwrap();
    let (count, counted) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let reader = {
        let (count, counted) = (Arc::clone(&count), Arc::clone(&counted));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut buffer) {
                count.fetch_add(n, Ordering::Relaxed);
            }
            counted.store(1, Ordering::Relaxed);
        })
    };
    let moves = |until: Duration| {
        let before = count.load(Ordering::Relaxed);
        let began = Instant::now();
        while began.elapsed() < until && count.load(Ordering::Relaxed) == before {
            std::thread::sleep(Duration::from_millis(5));
        }
        count.load(Ordering::Relaxed) > before
    };
    assert!(moves(Duration::from_secs(20)));
    sandbox.pause().unwrap();
    // What was written before.
    std::thread::sleep(Duration::from_millis(200));
    assert!(!moves(Duration::from_millis(500)));
    sandbox.resume().unwrap();
    assert!(moves(Duration::from_secs(20)));
    // One that stands still is killed all the same, with all its processes.
    sandbox.pause().unwrap();
    sandbox.kill_handle().kill().unwrap();
    let exit = sandbox.wait(PATIENCE).unwrap();
    assert_eq!(exit.status, Status::Signal(9));
    reader.join().unwrap();
    assert_eq!(counted.load(Ordering::Relaxed), 1);
}

#[test]
fn an_alarm_that_another_process_sends_is_the_guests() {
    carlsbad_kit::require!(Capability::Kvm, Capability::Busybox);
    let runtime = runtime();
    let root = root();
    let template = busybox(&runtime, root.path());
    let script = "sleep 100 & kill -ALRM $!; wait $!; echo $?; \
                  (trap 'echo caught; exit' ALRM; while :; do :; done) & \
                  sleep 0.3; kill -ALRM $!; wait; kill -ALRM $$; echo not here";
    let exit = shell(&runtime, &template, script);
    assert_eq!(text(&exit.stdout), "142\ncaught\n", "{exit:?}");
    assert_eq!(exit.status, Status::Signal(libc::SIGALRM));
}
