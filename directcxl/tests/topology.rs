//! Scanning and planning, on copies of what the kernel shows in sysfs.
#![allow(
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test says what went wrong by failing"
)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use carlsbad_types::ByteSize;
use directcxl::Error;
use directcxl::topology::{self, Mode, Request};
use proptest::prelude::*;

/// A machine as Linux 6.12 shows it: a window over one host bridge, with devices below a switch.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn new(devices: usize, ram: u64, pmem: u64) -> Self {
        let machine = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(machine.root().join("bus/cxl/devices")).unwrap();
        fs::create_dir_all(machine.root().join("bus/cxl/drivers/cxl_region")).unwrap();
        fs::create_dir_all(machine.root().join("bus/dax/devices")).unwrap();
        fs::create_dir_all(machine.root().join("bus/dax/drivers/device_dax")).unwrap();
        machine.device(
            "root0/decoder0.0",
            &[
                ("start", "0x190000000"),
                ("size", "0x100000000"),
                ("interleave_ways", "1"),
                ("interleave_granularity", "256"),
                ("target_list", "12"),
                ("locked", "0"),
                ("cap_ram", "1"),
                ("cap_pmem", "1"),
                ("create_ram_region", "region0"),
                ("create_pmem_region", "region0"),
                ("delete_region", ""),
            ],
        );
        // A switch's decoder, which is no endpoint's.
        machine.device(
            "root0/port1/decoder1.0",
            &[("start", "0x0"), ("size", "0x0")],
        );
        for i in 0..devices {
            let pci = format!("pci0000:0c/0000:0c:00.0/0000:0d:00.0/0000:0{i}:00.0/mem{i}");
            machine.device(
                &pci,
                &[
                    ("serial", &format!("{:#x}", i + 1)),
                    ("numa_node", "0"),
                    ("ram/size", &format!("{ram:#x}")),
                    ("pmem/size", &format!("{pmem:#x}")),
                ],
            );
            let endpoint = format!("root0/port1/endpoint{}", i + 2);
            machine.device(&endpoint, &[]);
            symlink(machine.real(&pci), machine.real(&endpoint).join("uport")).unwrap();
            for decoder in 0..2 {
                machine.device(
                    &format!("{endpoint}/decoder{}.{decoder}", i + 2),
                    &[("mode", "none"), ("dpa_size", "0x0"), ("region", "")],
                );
            }
        }
        machine
    }

    fn root(&self) -> &Path {
        self.dir.path()
    }

    fn real(&self, path: &str) -> PathBuf {
        self.root().join("devices/platform/ACPI0017:00").join(path)
    }

    fn device(&self, path: &str, attributes: &[(&str, &str)]) {
        let real = self.real(path);
        fs::create_dir_all(&real).unwrap();
        for (name, value) in attributes {
            let file = real.join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, format!("{value}\n")).unwrap();
        }
        let name = real.file_name().unwrap().to_owned();
        let bus = if path.contains("/dax") { "dax" } else { "cxl" };
        let link = self.root().join("bus").join(bus).join("devices").join(name);
        let _again = symlink(&real, link);
    }

    fn driver(&self, path: &str, driver: &str) {
        let bus = if path.contains("/dax") { "dax" } else { "cxl" };
        let to = self
            .root()
            .join("bus")
            .join(bus)
            .join("drivers")
            .join(driver);
        fs::create_dir_all(&to).unwrap();
        symlink(to, self.real(path).join("driver")).unwrap();
    }

    fn plan(&self, request: &Request) -> Result<topology::Plan, Error> {
        topology::plan(&topology::scan(self.root()).unwrap(), request)
    }
}

const GIB: u64 = 1 << 30;

#[test]
fn a_scan_sees_devices_windows_decoders_regions_and_dax() {
    let machine = Machine::new(2, GIB, 0);
    machine.device(
        "root0/decoder0.0/region3",
        &[
            ("size", "0x20000000"),
            ("interleave_ways", "2"),
            ("interleave_granularity", "512"),
            ("commit", "1"),
        ],
    );
    machine.driver("root0/decoder0.0/region3", "cxl_region");
    machine.device(
        "root0/decoder0.0/region3/dax_region3/dax3.0",
        &[
            ("size", "536870912"),
            ("align", "2097152"),
            ("target_node", "1"),
        ],
    );
    machine.driver("root0/decoder0.0/region3/dax_region3/dax3.0", "kmem");
    let found = topology::scan(machine.root()).unwrap();
    assert_eq!(found.memdevs.len(), 2);
    assert_eq!(found.memdevs[1].serial, 2);
    assert_eq!(found.memdevs[1].ram, ByteSize::gib(1));
    assert_eq!(found.memdevs[1].endpoint.as_deref(), Some("endpoint3"));
    assert_eq!(
        found.memdevs[0].path,
        ["pci0000:0c", "0000:0c:00.0", "0000:0d:00.0", "0000:00:00.0"]
    );
    assert_eq!(found.root_decoders.len(), 1);
    assert_eq!(found.root_decoders[0].start, 0x1_9000_0000);
    assert_eq!(found.root_decoders[0].targets, [12]);
    assert_eq!(found.endpoint_decoders.len(), 4);
    assert_eq!(found.endpoint_decoders[3].endpoint, "endpoint3");
    let region = &found.regions[0];
    assert_eq!(
        (region.name.as_str(), region.ways, region.committed),
        ("region3", 2, true)
    );
    assert_eq!(region.root_decoder.as_deref(), Some("decoder0.0"));
    assert_eq!(region.driver.as_deref(), Some("cxl_region"));
    let dax = &found.dax[0];
    assert_eq!(
        (dax.size, dax.align),
        (ByteSize::mib(512), ByteSize::mib(2))
    );
    assert_eq!(dax.region.as_deref(), Some("region3"));
    let why = dax.usable(&found).unwrap_err().to_string();
    assert!(
        why.contains("system memory") && why.contains("daxctl"),
        "{why}"
    );
    // A machine without CXL is no error.
    let nothing = topology::scan(Path::new("/nonexistent")).unwrap();
    assert!(nothing.memdevs.is_empty() && nothing.dax.is_empty());
}

#[test]
fn a_region_over_two_devices_is_planned_step_by_step() {
    let machine = Machine::new(2, GIB, 0);
    let plan = machine.plan(&Request::new(Mode::Volatile)).unwrap();
    assert_eq!(plan.memdevs, ["mem0", "mem1"]);
    assert_eq!(plan.decoders, ["decoder2.0", "decoder3.0"]);
    assert_eq!((plan.size, plan.granularity), (ByteSize::gib(2), 256));
    let writes: Vec<_> = plan
        .writes()
        .into_iter()
        .map(|write| {
            format!(
                "{} > {}",
                write.value,
                write.to.trim_start_matches("bus/cxl/")
            )
        })
        .collect();
    assert_eq!(
        writes,
        [
            "{region} > devices/decoder0.0/create_ram_region",
            "256 > devices/{region}/interleave_granularity",
            "2 > devices/{region}/interleave_ways",
            "ram > devices/decoder2.0/mode",
            "0x40000000 > devices/decoder2.0/dpa_size",
            "ram > devices/decoder3.0/mode",
            "0x40000000 > devices/decoder3.0/dpa_size",
            "0x80000000 > devices/{region}/size",
            "decoder2.0 > devices/{region}/target0",
            "decoder3.0 > devices/{region}/target1",
            "1 > devices/{region}/commit",
            "{region} > drivers/cxl_region/bind",
        ]
    );
}

#[test]
fn what_cannot_be_planned_says_why_and_what_would_help() {
    let machine = Machine::new(3, GIB, 0);
    let base = Request::new(Mode::Volatile);
    let refused = |request: Request, why: &str| match machine.plan(&request) {
        Err(Error::Topology {
            why: found, fix, ..
        }) => {
            assert!(found.contains(why) && !fix.is_empty(), "{found}: {fix}");
        }
        other => panic!("{other:?}"),
    };
    let named = |names: &[&str]| Request {
        memdevs: names.iter().map(ToString::to_string).collect(),
        ..base.clone()
    };
    refused(Request::new(Mode::Pmem), "no device has pmem memory");
    refused(named(&["mem0", "mem7"]), "there is no mem7");
    refused(named(&["mem0", "mem0"]), "named twice");
    refused(
        Request {
            ways: Some(2),
            ..named(&["mem0"])
        },
        "1 devices are named",
    );
    refused(
        Request {
            ways: Some(5),
            ..base.clone()
        },
        "5 devices are wanted",
    );
    refused(
        Request {
            granularity: Some(300),
            ..base.clone()
        },
        "no granularity",
    );
    refused(
        Request {
            size: Some(ByteSize::gib(9)),
            ..base.clone()
        },
        "the devices have",
    );
    refused(
        Request {
            size: Some(ByteSize::mib(300)),
            ..base.clone()
        },
        "no size of a region",
    );
    refused(
        Request {
            size: Some(ByteSize::ZERO),
            ..base.clone()
        },
        "no size of a region",
    );
    refused(
        Request {
            root_decoder: Some("decoder9.0".to_owned()),
            ..base.clone()
        },
        "no root decoder",
    );

    // A window that another region fills.
    machine.device("root0/decoder0.0/region0", &[("size", "0xc0000000")]);
    refused(
        Request {
            ways: Some(2),
            size: Some(ByteSize::gib(2)),
            ..base.clone()
        },
        "has addresses for",
    );
    // A device in use, and one that no driver leads to.
    fs::write(
        machine.real("root0/port1/endpoint2/decoder2.0/region"),
        "region0\n",
    )
    .unwrap();
    fs::write(
        machine.real("root0/port1/endpoint2/decoder2.0/mode"),
        "ram\n",
    )
    .unwrap();
    fs::write(
        machine.real("root0/port1/endpoint2/decoder2.0/dpa_size"),
        "0x40000000\n",
    )
    .unwrap();
    refused(named(&["mem0"]), "in use by region0");
    fs::remove_file(machine.real("root0/port1/endpoint3/uport")).unwrap();
    refused(named(&["mem1"]), "no endpoint port");
    let nothing = tempfile::tempdir().unwrap();
    let empty = topology::scan(nothing.path()).unwrap();
    assert!(
        topology::plan(&empty, &base)
            .unwrap_err()
            .to_string()
            .contains("no CXL window")
    );
}

#[test]
fn a_plan_is_applied_by_writing_it_and_a_refusal_is_explained() {
    let machine = Machine::new(2, GIB, 0);
    let plan = machine.plan(&Request::new(Mode::Volatile)).unwrap();
    // Without the region, which only the kernel makes: the second write fails, and says so.
    let refused = topology::apply(machine.root(), &plan).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("set the granularity") && text.contains("6.3"),
        "{text}"
    );
    // With everything that the kernel would make.
    machine.device(
        "root0/decoder0.0/region0",
        &[
            ("interleave_granularity", ""),
            ("interleave_ways", ""),
            ("size", "0"),
            ("target0", ""),
            ("target1", ""),
            ("commit", "0"),
        ],
    );
    fs::write(machine.root().join("bus/cxl/drivers/cxl_region/bind"), "").unwrap();
    machine.device(
        "root0/decoder0.0/region0/dax_region0/dax0.0",
        &[("size", "2147483648"), ("align", "2097152")],
    );
    fs::write(machine.root().join("bus/dax/drivers/device_dax/new_id"), "").unwrap();
    let applied = topology::apply(machine.root(), &plan).unwrap();
    assert_eq!(applied.region, "region0");
    assert_eq!(applied.device.as_deref(), Some(Path::new("/dev/dax0.0")));
    let read = |path: &str| {
        let text = fs::read_to_string(machine.root().join(path)).unwrap();
        text.trim_end().to_owned()
    };
    assert_eq!(read("bus/cxl/devices/region0/target1"), "decoder3.0");
    assert_eq!(read("bus/cxl/devices/decoder2.0/dpa_size"), "0x40000000");
    assert_eq!(read("bus/cxl/drivers/cxl_region/bind"), "region0");
    assert_eq!(read("bus/dax/drivers/device_dax/new_id"), "dax0.0");
    assert!(topology::destroy(machine.root(), "region9").is_err());
}

#[test]
fn a_device_that_cannot_be_mapped_says_what_would_make_it_one() {
    let machine = Machine::new(1, GIB, 0);
    let cases = [
        (
            "dax1.0",
            Some("kmem"),
            "2097152",
            "1073741824",
            "system memory",
        ),
        ("dax2.0", None, "2097152", "1073741824", "no driver"),
        (
            "dax3.0",
            Some("device_dax"),
            "1073741824",
            "1073741824",
            "alignment",
        ),
        ("dax4.0", Some("device_dax"), "2097152", "0", "size is 0"),
    ];
    for (name, driver, align, size, _) in cases {
        let path = format!("root0/decoder0.0/{name}");
        machine.device(&path, &[("size", size), ("align", align)]);
        if let Some(driver) = driver {
            machine.driver(&path, driver);
        }
    }
    let found = topology::scan(machine.root()).unwrap();
    assert_eq!(found.dax.len(), cases.len());
    for (dax, (name, .., why)) in found.dax.iter().zip(cases) {
        let text = dax.usable(&found).unwrap_err().to_string();
        assert!(text.contains(why), "{name}: {text}");
    }
}

proptest! {
    /// Whatever is asked of whatever machine: a plan keeps to the rules of decoders, or is refused.
    #[test]
    fn every_plan_keeps_to_the_rules_of_decoders(
        devices in 1usize..9, quarters in 0u64..9, ways in prop::option::of(0u32..18),
        granularity in prop::option::of(0u64..20_000), size in prop::option::of(0u64..64),
    ) {
        let machine = Machine::new(devices, quarters * GIB / 4, 0);
        let request = Request {
            ways, granularity, size: size.map(|n| ByteSize::mib(128 * n)),
            ..Request::new(Mode::Volatile)
        };
        match machine.plan(&request) {
            Ok(plan) => {
                prop_assert!([1, 2, 3, 4, 6, 8, 12, 16].contains(&plan.ways()));
                prop_assert!(plan.granularity.is_power_of_two() && (256..=16384).contains(&plan.granularity));
                prop_assert_eq!(plan.size.get() % (plan.ways() as u64 * (256 << 20)), 0);
                prop_assert!(plan.size.get() / plan.ways() as u64 <= quarters * GIB / 4);
                prop_assert!(plan.size > ByteSize::ZERO && plan.size.get() <= 4 * GIB);
            }
            Err(Error::Topology { why, fix, .. }) => prop_assert!(!why.is_empty() && !fix.is_empty()),
            Err(why) => prop_assert!(false, "{}", why),
        }
    }
}
