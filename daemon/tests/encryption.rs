//! What others can make of the traffic between hosts: nothing. And what hosts make of keys that are not right.

mod common;

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use common::secure::{Secure, write_keys};
use common::{LIMITS, Stage, captured, greet, hello, host_a, ours, words};
use memlane_api::types::Phase;
use memlane_keys::{Authority, Validity};
use memlane_lab::{Capture, HostId, LabOptions, LabProcess, LabVmm, Requirement, RigOptions};
use memlane_net::config::CONTROL_PORT;
use memlane_protocol::wire::control::{Control, Offer};
use memlane_protocol::wire::hello::{Answer, Purpose};
use rustix::process::Signal;

const DAY: Duration = Duration::from_secs(24 * 3600);
const PAGE: usize = 4096;
/// A page is known by this much of its beginning.
const MARK: usize = 32;

fn week() -> Validity {
    Validity::days(7)
}

/// What nobody but the hosts is to see: the beginnings of the pages of a guest that hold something.
fn pages_of(vmm: &mut LabVmm) -> HashSet<Vec<u8>> {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", vmm.process().pid())).unwrap();
    let is_memory = |path: &std::path::PathBuf| {
        fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:"))
    };
    let files = descriptors.map(|entry| entry.unwrap().path()).filter(is_memory);
    let mut marks = HashSet::new();
    for file in files {
        let file = File::open(file).unwrap();
        let mut mark = vec![0; MARK];
        for page in 0..file.metadata().unwrap().len() as usize / PAGE {
            file.read_exact_at(&mut mark, (page * PAGE) as u64).unwrap();
            // What many pages may begin with says nothing.
            if mark.iter().collect::<HashSet<_>>().len() > MARK / 2 {
                marks.insert(mark.clone());
            }
        }
    }
    assert!(marks.len() > 1000, "the guest's memory holds {} pages that can be told", marks.len());
    marks
}

/// Listens to all that arrives at host B's ports while a guest moves. Returns how many of its pages were seen there,
/// how much was heard, and how often the first bytes of a frame's header were seen.
fn overheard(stage: &mut Stage) -> (usize, usize, usize) {
    let mut here = stage.rig.start_vmm(HostId::A, "web1", &words(GUEST)).unwrap();
    let mut there = stage.rig.start_vmm(HostId::B, "web1", &words(&format!("{GUEST} --incoming"))).unwrap();
    let marks = pages_of(&mut here);
    let host = stage.rig.lab().host(HostId::B);
    let interface = host.ports()[0].interface.clone();
    let capture = host.run_in(|| Capture::open(&interface)).unwrap().unwrap();
    let done = AtomicBool::new(false);
    let heard = std::thread::scope(|scope| {
        // It looks at what it has heard afterwards, since it would miss what comes meanwhile.
        let listener = scope.spawn(|| {
            let mut frames = Vec::new();
            while !done.load(Ordering::Relaxed) {
                frames.extend(capture.next(Duration::from_millis(100)).unwrap().map(|frame| frame.bytes));
            }
            frames
        });
        let answer = stage.migrate("web1", &["--verify", "--downtime-limit", "20s"]);
        done.store(true, Ordering::Relaxed);
        assert_eq!(answer.code, 0, "{}", answer.text);
        listener.join().unwrap()
    });
    common::assert_runs(&mut there);
    let (mut seen, mut headers) = (HashSet::new(), 0);
    for bytes in &heard {
        headers += bytes.windows(4).filter(|part| part == b"MLFr").count();
        seen.extend(bytes.windows(MARK).filter(|part| marks.contains(*part)));
    }
    (seen.len(), heard.iter().map(Vec::len).sum(), headers)
}

const GUEST: &str =
    "--ram 64MiB --working-set 8MiB --rate 2000 --vcpus 1 --fill zero=10,random=80,compressible=10";

/// One who sees everything that flows sees no page and no header of ours; with encryption off, the same one does.
#[test]
fn who_sees_the_wire_sees_no_page() {
    let test = "who_sees_the_wire_sees_no_page";
    for insecure in [true, false] {
        // Slow enough for the listener.
        let lab =
            LabOptions { ports: 1, port_rate: Some("200mbit".parse().unwrap()), ..LabOptions::default() };
        let options = RigOptions { lab, tables: LIMITS.into(), insecure, ..RigOptions::default() };
        let Some(mut stage) = Stage::with(test, Requirement::LAB_WITH_KVM, options) else { return };
        let (pages, bytes, headers) = overheard(&mut stage);
        // A listener that is short of processor time may miss some.
        assert!(bytes > 20 << 20, "only {bytes} bytes were heard");
        if insecure {
            assert!(
                pages > 1000 && headers > 9,
                "the listener hears nothing: {pages} pages, {headers} headers"
            );
        } else {
            // Of so many random bytes, every hundredth run has such four by chance; three by chance no run has.
            assert!(pages == 0 && headers < 3, "{pages} pages and {headers} headers were seen on the wire");
        }
    }
}

/// Waits for what each host's log says of a certificate.
fn refused(stage: &mut Stage, words: [&str; 2]) {
    let answer = stage.rig.ctl(HostId::A, &["check", "web1", "host-b"]).unwrap();
    assert_eq!(answer.code, 3, "{}", answer.text);
    assert!(answer.text.contains(words[0]), "{words:?}: {}", answer.text);
    stage.wait_for_log(HostId::B, words[1]);
}

#[test]
fn keys_that_are_not_right_are_refused_with_words_on_both_sides() {
    let test = "keys_that_are_not_right_are_refused_with_words_on_both_sides";
    let Some(mut stage) = Stage::new(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let (fleet, others) = (Authority::new("fleet").unwrap(), Authority::new("others").unwrap());
    let now = SystemTime::now();
    write_keys(&stage, HostId::B, (&fleet, "host-b", week()), &fleet);
    stage.rig.start_daemon(HostId::B).unwrap();
    let cases = [
        (&others, week(), ["does not know the authority", "no authority that is known here has signed it"]),
        (
            &fleet,
            Validity { from: now - 3 * DAY, until: now - DAY },
            ["expired, or not valid yet", "it has expired"],
        ),
        (
            &fleet,
            Validity { from: now + DAY, until: now + 3 * DAY },
            ["expired, or not valid yet", "it is not valid yet"],
        ),
    ];
    for (authority, validity, words) in cases {
        write_keys(&stage, HostId::A, (authority, "host-a", validity), &fleet);
        stage.rig.start_daemon(HostId::A).unwrap();
        stage.wait_for_standing(HostId::A, "web1", "running");
        refused(&mut stage, words);
    }
    // A host of the fleet that is no peer, and calls itself by the name of one.
    write_keys(&stage, HostId::A, (&fleet, "host-c", week()), &fleet);
    let config = stage.rig.config_file(HostId::A);
    let log = stage.log(HostId::A);
    stage.rig.start_daemon_unattended(HostId::A).unwrap();
    stage.wait_for_log(HostId::A, "it is of \"host-c\", and this host is host-a");
    assert!(stage.log(HostId::A).len() > log.len());
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("host = \"host-a\"", "host = \"host-c\"")).unwrap();
    fs::remove_dir_all(stage.rig.lab().host(HostId::A).directory().join("journal")).unwrap();
    stage.rig.start_daemon(HostId::A).unwrap();
    stage.wait_for_standing(HostId::A, "web1", "running");
    refused(
        &mut stage,
        ["which is the name of no [[peer]] of the called host", "the certificate is of \"host-c\""],
    );
    fs::write(&config, text).unwrap();
    fs::remove_dir_all(stage.rig.lab().host(HostId::A).directory().join("journal")).unwrap();

    // One of the two does not encrypt.
    write_keys(&stage, HostId::A, (&fleet, "host-a", week()), &fleet);
    let insecure = |text: String| format!("insecure = true\n{text}");
    let secure = |text: String| text.replace("insecure = true\n", "");
    stage.reconfigure(HostId::A, insecure);
    stage.wait_for_standing(HostId::A, "web1", "running");
    refused(&mut stage, ["host-a did not encrypt the connection", "host-a did not encrypt the connection"]);
    stage.reconfigure(HostId::A, secure);
    stage.reconfigure(HostId::B, insecure);
    stage.wait_for_standing(HostId::A, "web1", "running");
    stage.wait_for_standing(HostId::B, "web1", "incoming");
    refused(
        &mut stage,
        ["it is configured as insecure", "the other host encrypts, and this one is configured as insecure"],
    );
    stage.reconfigure(HostId::B, secure);
    stage.wait_for_standing(HostId::B, "web1", "incoming");

    stage.assert_runs_on("web1", &mut guest);
    stage.assert_moves("web1", &mut there);
}

/// What a token was good for that somebody has stolen: with a certificate of another host it opens nothing, and without
/// one even less.
#[test]
fn another_host_of_the_fleet_speaks_for_itself_alone() {
    let test = "another_host_of_the_fleet_speaks_for_itself_alone";
    let Some(mut stage) = Stage::insecure(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let offer = captured(&mut stage);
    let fleet = Authority::new("fleet").unwrap();
    for (id, name) in [(HostId::A, "host-a"), (HostId::B, "host-b")] {
        write_keys(&stage, id, (&fleet, name, week()), &fleet);
        stage.reconfigure(id, |text| text.replace("insecure = true\n", ""));
    }
    stage.wait_for_standing(HostId::B, "web1", "incoming");
    let host_a_keys = stage.rig.lab().host(HostId::A).directory().to_owned();
    let host_c_keys = host_a_keys.join("host-c");
    fleet.issue_to(&host_c_keys, "host-c", week()).unwrap();

    // The test is host A's daemon for once, and is given a token.
    let mut control = Secure::connect(&stage, &host_a_keys, "host-a", false).unwrap();
    assert!(matches!(control.greet("host-a", Purpose::Control).unwrap(), Answer::Welcome { .. }));
    let ports = stage.rig.lab().host(HostId::A).ports();
    control.send(&Control::LanesFrom(ports.iter().map(|port| port.address.into()).collect()));
    control.send(&Control::Offer(Offer { migration: ours(), ..offer.clone() }));
    let Control::Accept(accept) = control.receive() else { panic!("the offer is not accepted") };
    let token = accept.token;

    let purposes = [Purpose::Lane { token, lane: 0 }, Purpose::Faults { token }, Purpose::Control];
    for purpose in purposes {
        let lane = purpose != Purpose::Control;
        // With the certificate of another host, by either name.
        for name in ["host-a", "host-c"] {
            let mut stranger = Secure::connect(&stage, &host_c_keys, "host-c", lane).unwrap();
            let answer = stranger.greet(name, purpose).unwrap();
            let Answer::Refused { reason } = answer else { panic!("host-c is welcome as {name}") };
            assert!(reason.contains("the certificate is of \"host-c\""), "{reason}");
        }
        // A local user of host A, who has no key.
        let address = if lane { common::lane_address(&stage) } else { control_address(&stage) };
        let stream = stage.rig.lab().host(HostId::A).run_in(|| std::net::TcpStream::connect(address));
        let answer = greet(&mut stream.unwrap().unwrap(), &hello(host_a(), purpose)).unwrap();
        let Answer::Refused { reason } = answer else { panic!("{purpose:?} is welcome without a key") };
        assert!(reason.contains("did not encrypt the connection"), "{reason}");
    }
    // The real one is not disturbed, and a known id is not offered twice.
    let mut lane = Secure::connect(&stage, &host_a_keys, "host-a", true).unwrap();
    assert!(matches!(lane.greet("host-a", purposes[0]).unwrap(), Answer::Welcome { .. }));
    drop((lane, control));
    stage.wait_for_end_of_ours("control connection");
    stage.assert_runs_on("web1", &mut guest);
    stage.assert_moves("web1", &mut there);
}

fn control_address(stage: &Stage) -> std::net::SocketAddr {
    let host = stage.rig.lab().host(HostId::B);
    std::net::SocketAddr::new(host.control_address().into(), CONTROL_PORT)
}

fn hang_up(stage: &mut Stage, id: HostId) {
    let process: &mut LabProcess = stage.rig.daemon(id);
    common::signal(process, Signal::HUP);
}

/// Hosts of two owners: each has its own authority, and takes that of the other for the other's hosts alone.
#[test]
fn two_administrations_trust_each_other_for_their_own_hosts_alone() {
    let test = "two_administrations_trust_each_other_for_their_own_hosts_alone";
    let Some(mut stage) = Stage::new(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let (east, west) = (Authority::new("east").unwrap(), Authority::new("west").unwrap());
    let sides = [(HostId::A, "host-a", &east, &west), (HostId::B, "host-b", &west, &east)];
    for (id, name, own, _) in sides {
        write_keys(&stage, id, (own, name, week()), own);
        stage.rig.start_daemon(id).unwrap();
    }
    stage.wait_for_standing(HostId::A, "web1", "running");
    refused(
        &mut stage,
        ["no authority that is known here has signed it", "does not know the authority that signed"],
    );

    for (id, _, _, other) in sides {
        let file = stage.rig.lab().host(id).directory().join("partner-ca.pem");
        fs::write(&file, other.certificate()).unwrap();
        let ca = format!("ca = \"{}\"\nmay_start_guests", file.display());
        stage.reconfigure(id, |text| text.replace("may_start_guests", &ca));
    }
    stage.assert_runs_on("web1", &mut guest);

    // The authority of host B's owner signs for no host of the other's, not even at host B.
    let forged = stage.rig.lab().host(HostId::A).directory().join("forged");
    west.issue_to(&forged, "host-a", week()).unwrap();
    for lane in [false, true] {
        let purpose = if lane { Purpose::Lane { token: [0; 16], lane: 0 } } else { Purpose::Control };
        let connected = Secure::connect(&stage, &forged, "host-a", lane);
        let answer = connected.and_then(|mut forger| forger.greet("host-a", purpose));
        assert!(!matches!(answer, Ok(Answer::Welcome { .. })), "{answer:?}");
    }
    stage.wait_for_log(HostId::B, "the certificate names host-a, and is not accepted");

    stage.assert_moves("web1", &mut there);
    let mut back =
        stage.rig.start_vmm(HostId::A, "web1", &words(&format!("{} --incoming", common::GUEST))).unwrap();
    let answer = stage.rig.ctl(HostId::B, &["migrate", "web1", "host-a", "--verify"]).unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    common::assert_runs(&mut back);
}

/// New keys come into use without a restart, and no migration is lost over it.
#[test]
fn keys_change_under_a_migration() {
    let test = "keys_change_under_a_migration";
    let lab = LabOptions { ports: 1, port_rate: Some("100mbit".parse().unwrap()), ..LabOptions::default() };
    let Some(mut stage) = Stage::new(test, lab) else { return };
    let mut guest = stage.rig.start_vmm(HostId::A, "web1", &words(GUEST)).unwrap();
    let mut there = stage.rig.start_vmm(HostId::B, "web1", &words(&format!("{GUEST} --incoming"))).unwrap();
    let expires = |stage: &Stage| {
        let status = stage.rig.ctl(HostId::A, &["status"]).unwrap();
        status.last().unwrap()["certificate_expires_seconds"].as_f64().unwrap()
    };
    let before = expires(&stage);
    let order = stage.begin("web1", &["--downtime-limit", "20s"]);
    stage.wait_until(HostId::A, "web1", "copying", |migration| {
        migration.phase == Phase::Copying && migration.bytes_sent > 1 << 20
    });
    // An authority that nobody has heard of before.
    let fleet = Authority::new("new").unwrap();
    for (id, name) in [(HostId::A, "host-a"), (HostId::B, "host-b")] {
        write_keys(&stage, id, (&fleet, name, week()), &fleet);
        hang_up(&mut stage, id);
        stage.wait_for_log(id, "the keys were read again");
    }
    assert!(expires(&stage) > before + 5.0 * DAY.as_secs_f64());
    order.expect(0, &[]);
    common::assert_runs(&mut there);
    common::wait_for_exit(guest.process());
    // The next one uses them. What cannot be used is not taken.
    let mut back = stage.rig.start_vmm(HostId::A, "web1", &words(&format!("{GUEST} --incoming"))).unwrap();
    let path = stage.rig.lab().host(HostId::B).directory().join(memlane_keys::CERTIFICATE);
    fs::write(&path, "nonsense").unwrap();
    hang_up(&mut stage, HostId::B);
    stage.wait_for_log(HostId::B, "the keys were not read again; those before stay in use");
    let answer = stage
        .rig
        .ctl(HostId::B, &["migrate", "web1", "host-a", "--downtime-limit", "20s", "--min-bandwidth", "1mbit"])
        .unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    common::assert_runs(&mut back);
}

/// Nobody overlooks that nothing is encrypted.
#[test]
fn insecure_is_loud() {
    for insecure in [true, false] {
        let options = RigOptions { insecure, ..RigOptions::default() };
        let Some(mut stage) = Stage::with("insecure_is_loud", Requirement::LAB, options) else { return };
        let status = stage.rig.ctl(HostId::A, &["status"]).unwrap();
        assert_eq!(status.last().unwrap()["insecure"], insecure);
        let metrics = stage.rig.metrics(HostId::A).unwrap();
        let line = format!("memlane_insecure {}", u8::from(insecure));
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
        let log = stage.log(HostId::A);
        assert_eq!(log.contains("not encrypted"), insecure, "{log}");
        assert_eq!(log.contains("is encrypted"), !insecure, "{log}");
    }
}
