use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const PRICE: CpuPrice = CpuPrice(ByteSize::gib(1));

/// A function of one configuration that serves 10 requests a second on one core.
fn function(name: &str, tensors: &[(u32, u64)], instances: u32) -> Function {
    let row = ProfileRow {
        cpus: 1.0,
        gpu_share: 0.0,
        memory: ByteSize::mib(1),
        batch: 1,
        concurrency: 1,
        latency: Duration::from_millis(100),
    };
    Function {
        name: name.to_owned(),
        tensors: tensors
            .iter()
            .map(|(id, mib)| (id.to_string(), ByteSize::mib(*mib)))
            .collect(),
        profile: Profile::new(vec![row]).unwrap(),
        slo: Duration::from_millis(150),
        rps: f64::from(instances) * 10.0,
    }
}

fn node(cpus: f64, memory: ByteSize) -> Node {
    Node {
        name: "n".to_owned(),
        cpus,
        gpus: 0,
        memory,
    }
}

/// Fewest bytes of any assignment, by trying all.
fn brute_force(functions: &[Function], nodes: &[Node], instances: &[Instance]) -> Option<ByteSize> {
    let problem = checked(functions, nodes).unwrap();
    fn all(
        problem: &Problem,
        nodes: &[Node],
        machines: &mut [Machine],
        left: &[Instance],
    ) -> Option<ByteSize> {
        let Some((one, rest)) = left.split_first() else {
            return Some(machines.iter().map(Machine::bytes).sum());
        };
        (0..nodes.len())
            .filter_map(|n| {
                if !machines[n].fits(problem, &nodes[n], one.function, &one.row) {
                    return None;
                }
                machines[n].add(problem, one.function, &one.row);
                let bytes = all(problem, nodes, machines, rest);
                machines[n].remove(problem, one.function, &one.row);
                bytes
            })
            .min()
    }
    let mut machines = vec![Machine::empty(&problem); nodes.len()];
    all(&problem, nodes, &mut machines, instances)
}

/// What a plan claims, counted anew from its instances alone.
fn assert_holds(plan: &Plan, functions: &[Function], nodes: &[Node]) {
    for (n, node) in nodes.iter().enumerate() {
        let here: Vec<_> = plan.instances.iter().filter(|i| i.node == n).collect();
        let cpus: f64 = here.iter().map(|i| i.row.cpus).sum();
        assert!(cpus <= node.cpus + 1e-6, "CPU share above 1");
        let unique: BTreeSet<_> = here
            .iter()
            .flat_map(|i| &functions[i.function].tensors)
            .collect();
        let tensors: ByteSize = unique.iter().map(|(_, size)| *size).sum();
        let private: ByteSize = here.iter().map(|i| i.row.memory).sum();
        assert_eq!(plan.tensor_bytes[n], tensors);
        assert_eq!(plan.private_bytes[n], private);
        assert!(tensors + private <= node.memory, "memory share above 1");
    }
    for (f, function) in functions.iter().enumerate() {
        let served: f64 = plan
            .instances
            .iter()
            .filter(|i| i.function == f)
            .map(|i| i.rps)
            .sum();
        assert!((served - function.rps).abs() < 1e-6, "load left");
    }
}

fn small_case() -> impl Strategy<Value = (Vec<Function>, Vec<Node>)> {
    let tensors = prop::collection::btree_map(0u32..8, 1u64..40, 0..6);
    let functions = prop::collection::vec((tensors, 1u32..3), 1..5);
    let nodes = prop::collection::vec((1u32..5, 20u64..300), 1..4);
    (functions, nodes).prop_map(|(functions, nodes)| {
        // One id, one size: the size follows from the id.
        let functions = functions
            .into_iter()
            .enumerate()
            .map(|(i, (tensors, load))| {
                let tensors: Vec<_> = tensors
                    .into_keys()
                    .map(|id| (id, u64::from(id * id % 13 + 1) * 4))
                    .collect();
                function(&format!("f{i}"), &tensors, load)
            });
        let nodes = nodes
            .into_iter()
            .map(|(cpus, mib)| node(cpus.into(), ByteSize::mib(mib)));
        (functions.collect(), nodes.collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn union_never_holds_more_than_the_papers_and_at_most_1_05_of_brute_force(
        (functions, nodes) in small_case()
    ) {
        let paper = place(&functions, &nodes, PRICE, Placement::Pairwise);
        let ours = place(&functions, &nodes, PRICE, Placement::Union);
        if let Ok(paper) = &paper {
            assert_holds(paper, &functions, &nodes);
            prop_assert!(ours.as_ref().unwrap().bytes() <= paper.bytes());
        }
        if let Ok(ours) = &ours {
            assert_holds(ours, &functions, &nodes);
            let best = brute_force(&functions, &nodes, &ours.instances).unwrap();
            prop_assert!(ours.bytes().get() as f64 <= 1.05 * best.get() as f64);
        }
    }

    /// Larger than what is searched exhaustively, so that moves and swaps stand alone.
    #[test]
    fn large_plans_hold_what_they_claim_and_no_more_than_the_papers(seed: u64) {
        let mut state = seed;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        let functions: Vec<_> = (0..30)
            .map(|i| {
                let base = random(4) as u32 * 100;
                let shared = random(20) as u32;
                let tensors: Vec<_> = (0..shared).map(|t| (base + t, 4))
                    .chain((0..random(5) as u32).map(|t| (1000 + i * 10 + t, 4)))
                    .collect();
                function(&format!("f{i}"), &tensors, 1 + random(5) as u32)
            })
            .collect();
        let nodes: Vec<_> = (0..12).map(|_| node(16.0, ByteSize::gib(1))).collect();
        let paper = place(&functions, &nodes, PRICE, Placement::Pairwise).unwrap();
        let ours = place(&functions, &nodes, PRICE, Placement::Union).unwrap();
        assert_holds(&ours, &functions, &nodes);
        prop_assert!(ours.bytes() <= paper.bytes());
    }
}

#[test]
fn the_union_sees_what_the_pairwise_maximum_does_not() {
    // Two small functions together hold all of `c`; one larger neighbour holds a little more than
    // either of them.
    let functions = [
        function("a", &[(1, 30)], 1),
        function("b", &[(2, 30)], 1),
        function("d", &[(3, 31), (4, 100)], 2),
        function("c", &[(1, 30), (2, 30), (3, 31)], 1),
    ];
    let nodes = [
        node(3.0, ByteSize::new(240 * MIB)),
        node(3.0, ByteSize::new(240 * MIB)),
    ];
    let paper = place(&functions, &nodes, PRICE, Placement::Pairwise).unwrap();
    let ours = place(&functions, &nodes, PRICE, Placement::Union).unwrap();
    assert!(ours.bytes() < paper.bytes(), "{ours:?} {paper:?}");
}

#[test]
fn what_fits_nowhere_is_infeasible_rather_than_for_ever() {
    let big = function("big", &[(1, 100)], 1);
    for placement in [Placement::Pairwise, Placement::Union] {
        let refused = |functions: &[Function], nodes: &[Node]| match place(
            functions, nodes, PRICE, placement,
        )
        .unwrap_err()
        {
            Error::Infeasible(why) => why,
            other => panic!("{other}"),
        };
        let small = node(8.0, ByteSize::mib(100));
        let slow = node(0.5, ByteSize::gib(1));
        let why = refused(std::slice::from_ref(&big), &[small, slow]);
        assert!(matches!(why, Infeasible::Capacity { .. }), "{why}");
        let why = refused(std::slice::from_ref(&big), &[]);
        assert!(matches!(why, Infeasible::Capacity { .. }), "{why}");

        let hasty = Function {
            slo: Duration::from_millis(99),
            ..big.clone()
        };
        let why = refused(&[hasty], &[node(8.0, ByteSize::gib(1))]);
        assert!(
            matches!(why, Infeasible::Slo { least, .. } if least.as_millis() == 100),
            "{why}"
        );
    }
}

#[test]
fn shares_of_a_gpu_are_of_one_gpu() {
    let on_gpu = |name: &str, share: f64| {
        let mut one = function(name, &[(1, 1)], 3);
        let row = ProfileRow {
            gpu_share: share,
            ..one.profile.rows()[0]
        };
        one.profile = Profile::new(vec![row]).unwrap();
        one
    };
    let two_gpus = Node {
        gpus: 2,
        ..node(8.0, ByteSize::gib(1))
    };
    let nodes = [two_gpus];
    // Three shares of 0.6 are 1.8 GPUs, but no two go onto one.
    assert!(place(&[on_gpu("f", 0.6)], &nodes, PRICE, Placement::Union).is_err());
    assert!(place(&[on_gpu("f", 0.5)], &nodes, PRICE, Placement::Union).is_ok());
}

#[test]
fn where_the_cheapest_configuration_has_no_room_another_one_serves() {
    let mut one = function("f", &[(1, 1)], 1);
    let small = one.profile.rows()[0];
    let large = ProfileRow {
        cpus: 4.0,
        batch: 16,
        latency: Duration::from_millis(70),
        ..small
    };
    one.profile = Profile::new(vec![small, large]).unwrap();
    one.rps = 220.0;
    let nodes = vec![node(2.0, ByteSize::gib(1)); 11];
    let plan = place(&[one], &nodes, PRICE, Placement::Union).unwrap();
    assert_eq!(plan.instances.len(), 22);
}

#[test]
fn input_that_cannot_be_is_refused() {
    let good = function("f", &[(1, 1)], 1);
    let nodes = [node(8.0, ByteSize::gib(1))];
    let bad = [
        Function {
            rps: f64::NAN,
            ..good.clone()
        },
        Function {
            rps: -1.0,
            ..good.clone()
        },
        Function {
            rps: 1e300,
            ..good.clone()
        },
        Function {
            tensors: vec![
                ("1".into(), ByteSize::new(1)),
                ("1".into(), ByteSize::new(2)),
            ],
            ..good.clone()
        },
    ];
    for function in bad {
        assert!(
            place(
                std::slice::from_ref(&function),
                &nodes,
                PRICE,
                Placement::Union
            )
            .is_err()
        );
    }
    let no_node = [node(f64::NAN, ByteSize::gib(1))];
    assert!(place(&[good], &no_node, PRICE, Placement::Union).is_err());
}
