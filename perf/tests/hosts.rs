//! Scenarios are measured between hosts that are reached over ssh: two namespaces, each with an ssh server and a key that
//! are there for this test alone. Root and OpenSSH are needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use memlane_lab::{
    HostId, Lab, LabOptions, LabProcess, Programs, RemoteHosts, Requirement, SSHD, Size, qemu, skip, wait_for,
};
use memlane_perf::scenario::{Bench, BulkScenario, Scenario, ScenarioCommand};

/// Two hosts that can be logged in to.
struct Reachable {
    hosts: RemoteHosts,
    _servers: Vec<LabProcess>,
    _lab: Lab,
}

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    order: ScenarioCommand,
}

impl Reachable {
    fn new() -> Self {
        let lab = Lab::new(LabOptions { ports: 2, ..LabOptions::default() }).expect("a lab");
        let directory = lab.host(HostId::A).directory();
        let (host_key, user_key) = (make_key(&directory.join("host")), make_key(&directory.join("user")));
        // Where the server wants its unprivileged half to live.
        fs::create_dir_all("/run/sshd").expect("a directory");
        let mut known = String::new();
        let mut servers = Vec::new();
        for host in lab.hosts() {
            let address = host.control_address();
            let config = host.directory().join("sshd_config");
            let text = format!(
                "ListenAddress {address}\nHostKey {}\nAuthorizedKeysFile {}.pub\nPidFile none\nUsePAM no\n\
                 StrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n",
                host_key.display(),
                user_key.display()
            );
            fs::write(&config, text).expect("a configuration");
            let mut command = host.command(SSHD);
            command.args(["-D", "-e", "-f"]).arg(&config);
            servers.push(host.spawn("sshd", command).expect("a server"));
            let listens = || host.run_in(|| std::net::TcpStream::connect((address, 22))).ok()?.ok();
            wait_for("the ssh server", std::time::Duration::from_secs(20), listens).expect("it listens");
            let key = fs::read_to_string(host_key.with_extension("pub")).expect("a key");
            known += &format!("{address} {key}");
        }
        let known_hosts = directory.join("known_hosts");
        fs::write(&known_hosts, known).expect("a file");
        let ssh = format!(
            "ip netns exec {} ssh -F none -i {} -o IdentitiesOnly=yes -o UserKnownHostsFile={} -o LogLevel=ERROR",
            lab.host(HostId::A).namespace(),
            user_key.display(),
            known_hosts.display()
        );
        let addresses = [HostId::A, HostId::B].map(|id| lab.host(id).control_address());
        let ports = lab.host(HostId::A).ports().iter().zip(lab.host(HostId::B).ports());
        let hosts = RemoteHosts {
            targets: addresses.map(|address| format!("root@{address}")),
            ports: ports.map(|(here, there)| [here.address, there.address]).collect(),
            ssh: ssh.split_whitespace().map(Into::into).collect(),
            agent: env!("CARGO_BIN_EXE_memlane-perf").into(),
        };
        Self { hosts, _servers: servers, _lab: lab }
    }
}

fn make_key(path: &Path) -> PathBuf {
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path).status();
    assert!(made.expect("ssh-keygen").success());
    path.to_owned()
}

/// What agents have left behind, of this test or of any other.
fn left() -> Vec<PathBuf> {
    let entries = fs::read_dir("/tmp").expect("a directory").flatten().map(|entry| entry.path());
    entries.filter(|path| path.join("agent").exists()).collect()
}

#[test]
fn hosts_that_are_there_already_are_measured() {
    let needs = [Requirement::LAB, &[Requirement::Sshd]].concat();
    if skip("hosts_that_are_there_already_are_measured", &needs) {
        return;
    }
    let before = left();
    let reachable = Reachable::new();
    let programs = Programs::build(false).expect("programs");
    let bench = Bench { programs, hosts: Some(reachable.hosts.clone()), repetitions: 1 };
    let report = BulkScenario { ram: Size::from_mib(64), ports: 1, without_qemu: false }
        .measure(&bench)
        .expect("a measurement");
    let json = report.json();
    assert_eq!(json["settings"]["ports"], 2, "as many as there are");
    for figures in [&json["memlane"]["prepared"], &json["baselines"]["raw"]["fresh"]] {
        for name in ["total_seconds", "gbit_per_second", "cpu_seconds_per_gb"] {
            assert!(figures[name]["median"].as_f64() > Some(0.0), "no {name} in {json}");
        }
    }
    assert!(json["ratios"]["vs_raw"].as_f64() > Some(0.0), "{json}");
    let with_qemu = qemu::program_elsewhere().exists();
    assert_eq!(json["ratios"]["vs_qemu"].as_f64() > Some(0.0), with_qemu, "{json}");

    let line = ["bench", "busy", "--ram", "64MiB", "--shares", "30", "--port-rate", "200mbit"];
    let ScenarioCommand::Busy(busy) = Line::parse_from(line).order else { unreachable!("busy was said") };
    let json = busy.scenario.measure(&bench).expect("a measurement").json();
    // What is ideal depends on what ports carry, which nobody has made them carry.
    assert!(json["ratios"]["bytes_vs_ideal_30"].as_f64() > Some(0.0), "{json}");
    assert_eq!(json["ratios"]["limit_kept"], 1.0, "{json}");
    assert_eq!(left(), before, "the agents have cleaned up");

    // Whoever cannot log in is told so, and not asked for a password.
    let mut stranger = reachable.hosts.clone();
    stranger.targets[1] = stranger.targets[1].replace("root@", "nobody@");
    let bench = Bench { hosts: Some(stranger), ..bench };
    let error = busy.scenario.measure(&bench).expect_err("nobody may log in");
    assert!(format!("{error:#}").contains("connecting to nobody@"), "{error:#}");
    assert_eq!(left(), before, "the agent of the other host has cleaned up");
}

#[test]
fn scenarios_that_need_hosts_of_the_harness_say_so() {
    for scenario in ["lostport", "wan", "all"] {
        let order = Line::parse_from(["bench", scenario, "--hosts", "a,b"]).order;
        let programs = || Programs::build(false).expect("programs");
        let error = order.carry_out(&programs(), &mut |_| Ok(())).expect_err("no such hosts");
        assert!(error.to_string().contains("--hosts"), "{error}");
    }
}
