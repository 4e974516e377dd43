//! Bundles of the OCI runtime specification.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use carlsbad_kit::scratch;
use carlsbad_types::ByteSize;
use rund_rt::Error;
use rund_rt::oci::Bundle;
use serde_json::{Value, json};

fn config() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "hooks": {"prestart": []},
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0]},
            "capabilities": {"effective": ["CAP_CHOWN"], "ambient": []},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
            "apparmorProfile": "",
            "cwd": "/work",
            "args": ["tool", "x"],
            "env": ["PATH=/sbin:/usr/bin", "A=b"]
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]
            }
        ],
        "annotations": {"a": "b"},
        "linux": {
            "namespaces": [{"type": "pid"}],
            "resources": {
                "memory": {"limit": 33554432},
                "cpu": {"quota": 50000, "period": 100000, "shares": 1024},
                "pids": {"limit": 16},
                "devices": [{"allow": false, "access": "rwm"}]
            }
        }
    })
}

fn bundle(at: &Path, config: &Value) -> Result<Bundle, Error> {
    fs::create_dir_all(at.join("rootfs/usr/bin")).unwrap();
    fs::write(at.join("config.json"), config.to_string()).unwrap();
    Bundle::open(at)
}

#[test]
fn a_bundle_is_a_template_and_a_clone() {
    let dir = scratch::on_disk().unwrap();
    let bundle = bundle(dir.path(), &config()).unwrap();
    let root = dir.path().canonicalize().unwrap().join("rootfs");
    fs::write(root.join("usr/bin/real"), "x").unwrap();
    // Absolute, as in images: it begins at the root, not at the host's.
    symlink("/usr/bin/real", root.join("usr/bin/tool")).unwrap();
    let template = bundle.template().unwrap();
    assert_eq!(template.program, root.join("usr/bin/real"));
    // As Linux has it of a program that was found through a link.
    assert_eq!(template.path_inside(), Path::new("/usr/bin/real"));
    let clone = bundle.clone_spec().unwrap();
    assert_eq!(clone.args.unwrap(), ["tool", "x"]);
    assert_eq!(clone.env.unwrap().len(), 2);
    assert_eq!(clone.cwd.unwrap(), Path::new("/work"));
    assert_eq!(clone.limits.memory, Some(ByteSize::mib(32)));
    assert_eq!(clone.limits.cpus, Some(0.5));
    assert_eq!(clone.limits.processes, Some(16));
    assert_eq!(bundle.annotation("a"), Some("b"));
}

#[test]
fn a_program_outside_of_the_root_is_not_found() {
    let dir = scratch::on_disk().unwrap();
    fs::write(dir.path().join("secret"), "x").unwrap();
    let bundle = bundle(dir.path(), &config()).unwrap();
    for target in ["../../../secret", "/secret", "/proc/self/exe"] {
        let link = dir.path().join("rootfs/usr/bin/tool");
        let _none_yet = fs::remove_file(&link);
        symlink(target, link).unwrap();
        assert!(
            matches!(bundle.template(), Err(Error::BadBundle { .. })),
            "{target}"
        );
    }
}

#[test]
fn what_is_not_done_is_refused_and_broken_files_are() {
    let dir = scratch::on_disk().unwrap();
    let changes = [
        ("/process/user/uid", json!(1000)),
        ("/process/user/umask", json!(63)),
        ("/process/terminal", json!(true)),
        ("/process/capabilities/bounding", json!(["CAP_SYS_ADMIN"])),
        ("/process/rlimits/0/soft", json!(10)),
        ("/process/rlimits/0/type", json!("RLIMIT_CPU")),
        ("/process/apparmorProfile", json!("strict")),
        ("/process/oomScoreAdj", json!(500)),
        ("/mounts/0/type", json!("bind")),
        ("/mounts/0/destination", json!("/elsewhere")),
        ("/mounts/1/destination", json!("/data")),
        ("/mounts/1/options/3", json!("size=4k")),
        ("/mounts/1/options/3", json!("ro")),
        ("/linux/namespaces/0/path", json!("/proc/1/ns/net")),
        (concat!("/root", "/path"), json!("../..")),
        ("/hooks", json!({"prestart": [{"path": "/bin/true"}]})),
        (
            "/linux/devices",
            json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]),
        ),
        ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ERRNO"})),
        ("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"})),
        ("/linux/resources/cpu/shares", json!(512)),
        ("/linux/resources/cpu/cpus", json!("0")),
        ("/linux/resources/memory/reservation", json!(4096)),
        ("/linux/resources/unified", json!({"memory.high": "1"})),
        ("/linux/aSettingOfTomorrow", json!(true)),
        ("/vm", json!({"kernel": {"path": "/vmlinuz"}})),
    ];
    for (at, value) in changes {
        let mut config = config();
        let (parent, last) = at.rsplit_once('/').unwrap();
        match config.pointer_mut(parent).unwrap() {
            Value::Array(list) => list[last.parse::<usize>().unwrap()] = value,
            object => object[last] = value,
        }
        let refused = bundle(dir.path(), &config).unwrap_err();
        assert!(
            matches!(refused, Error::BadBundle { .. }),
            "{at}: {refused}"
        );
    }
    for text in ["", "{", "[]", "{\"ociVersion\": 3}"] {
        fs::write(dir.path().join("config.json"), text).unwrap();
        assert!(matches!(
            Bundle::open(dir.path()),
            Err(Error::BadBundle { .. })
        ));
    }
    fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(matches!(
        Bundle::open(dir.path()),
        Err(Error::BadBundle { .. })
    ));
}
