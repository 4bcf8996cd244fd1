//! What a source may believe of its lanes, with real sockets and without.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use memlane_keys::{Authority, CA, CERTIFICATE, KEY, Validity};
use memlane_kvm::ram::{Backing, GuestRam};
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::frame::{
    Content, FRAME_HEADER_BYTES, PageRequest, RUN_BYTES, Run, contents_bytes, encode_compressed_head,
};
use memlane_tls::{Credentials, KeyFiles, MAX_RECORD_BYTES, PeerAuthority, Records, Step};
use proptest::prelude::*;

use crate::postcopy::PageServer;
use crate::send::encode::claim_frame;
use crate::*;

const PAGES: u64 = 2000;
/// Longest wait for what will happen.
const LONG: Duration = Duration::from_secs(30);

/// Makes a bell that does nothing.
fn silent() -> Bell {
    Arc::new(|| ())
}

fn ram() -> Arc<GuestRam> {
    Arc::new(GuestRam::create(&[(0, PAGES * PAGE_SIZE)], &Backing::Memfd).unwrap())
}

/// Every third page says its number; the others are zero.
fn fill(ram: &GuestRam) {
    (0..PAGES).step_by(3).for_each(|page| fill_page(ram, page));
}

fn fill_page(ram: &GuestRam, page: u64) {
    write_word(ram, page, page + 1);
}

fn write_word(ram: &GuestRam, page: u64, word: u64) {
    let slice = ram.slices(page..page + 1).next().unwrap();
    // SAFETY: within the slice, which no other thread uses.
    unsafe { slice.ptr.cast::<u64>().write(word) };
}

fn first_word(ram: &GuestRam, page: u64) -> u64 {
    let slice = ram.slices(page..page + 1).next().unwrap();
    // SAFETY: within the slice, which no thread writes any more.
    unsafe { slice.ptr.cast::<u64>().read() }
}

fn connection() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near.into(), listener.accept().unwrap().0.into())
}

fn until(done: impl Fn() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < LONG, "it never happens");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn knows_of_pages_in_hand_and_of_orphans() {
    let send_state = SendState::new(ram(), silent());
    let (mut cursor, mut runs) = (0, Vec::new());
    assert!(send_state.all_acknowledged());
    claim_frame(&send_state, &mut cursor, u64::MAX, &mut runs);
    assert!(runs.is_empty() && !send_state.all_acknowledged(), "a claim is open");
    send_state.settle(1);
    assert!(send_state.all_acknowledged());

    send_state.dirty.insert_range(10..20);
    assert!(!send_state.all_acknowledged());
    claim_frame(&send_state, &mut cursor, u64::MAX, &mut runs);
    assert!(send_state.dirty.is_empty() && !send_state.all_acknowledged(), "a frame is on its way");
    send_state.orphan(7, [runs].into_iter());
    assert_eq!(send_state.orphaned_lanes(), [7]);
    send_state.take_back(6);
    assert!(send_state.dirty.is_empty() && send_state.in_flight.count() == 10);
    send_state.take_back(7);
    assert!(send_state.orphaned_lanes().is_empty() && send_state.in_flight.is_empty());
    assert_eq!(send_state.dirty.next_run(0, u64::MAX), Some(10..20));
    assert!(!send_state.all_acknowledged());
}

#[test]
fn a_guest_comes_to_rest_where_it_ran_and_nowhere_else() {
    let send_state = SendState::new(ram(), silent());
    assert!(!send_state.devices_may_write(), "it runs");
    send_state.paused.store(true, Ordering::Release);
    assert!(send_state.devices_may_write());
    assert!(!SendState::of_paused_guest(ram(), silent()).devices_may_write(), "it runs elsewhere");
}

#[test]
fn a_small_window_bounds_contents_and_zeros_hardly() {
    let send_state = SendState::new(ram(), silent());
    fill(&send_state.ram);
    send_state.dirty.insert_range(0..PAGES);
    let (mut cursor, mut runs) = (0, Vec::new());
    claim_frame(&send_state, &mut cursor, 16 * PAGE_SIZE, &mut runs);
    // A page of 16, and two that are taken for an eighth of one, again and again.
    assert_eq!(contents_bytes(&runs), 13 * PAGE_SIZE);
    assert_eq!((send_state.in_flight.count(), cursor), (37, 37));
    let empty = SendState::new(ram(), silent());
    empty.dirty.insert_range(0..PAGES);
    let mut cursor = 0;
    claim_frame(&empty, &mut cursor, 16 * PAGE_SIZE, &mut runs);
    assert_eq!((runs.len(), cursor), (1, 16 * 8 - 7), "less than a page with contents may take is left");
}

/// The first lane's peer closes without a word; the second brings everything across.
#[test]
fn a_lost_lane_leaves_its_pages_to_the_others() {
    let (here, there) = (ram(), ram());
    fill(&here);
    let send_state = Arc::new(SendState::new(here, silent()));
    let receive_state = Arc::new(ReceiveState { ram: there.clone(), postcopy: None });
    let send = |number: u16, socket: Arc<OwnedFd>| {
        let (send_state, lane) = (send_state.clone(), (send_state.take_waker().unwrap(), number));
        std::thread::spawn(move || {
            LaneSender::new(send_state, Arc::default(), Transport::plain(socket), lane, LONG).unwrap().run()
        })
    };
    send_state.dirty.insert_range(0..PAGES);

    let (near, far) = connection();
    let lost = send(3, near.into());
    until(|| !send_state.in_flight.is_empty());
    drop(far);
    lost.join().unwrap();
    assert_eq!(send_state.orphaned_lanes(), [3]);

    let (near, far) = connection();
    let near = Arc::new(near);
    let receiver = std::thread::spawn(move || {
        LaneReceiver::new(receive_state, Arc::default(), Transport::plain(Arc::new(far))).unwrap().run()
    });
    let sender = send(4, near.clone());
    until(|| send_state.dirty.is_empty());
    assert!(!send_state.all_acknowledged(), "the lost lane's pages are not there");
    send_state.take_back(3);
    until(|| send_state.all_acknowledged());
    assert!(send_state.in_flight.is_empty());
    for page in 0..PAGES {
        assert_eq!(first_word(&there, page), if page % 3 == 0 { page + 1 } else { 0 }, "page {page}");
    }
    crate::socket::hang_up(&*near);
    assert!(matches!(sender.join().unwrap(), LaneError::HungUp));
    assert!(matches!(receiver.join().unwrap(), LaneError::HungUp));
    assert_eq!(send_state.orphaned_lanes(), [4], "it left nothing, and the destination is to close it too");
    send_state.take_back(4);
    assert!(send_state.orphaned_lanes().is_empty() && send_state.all_acknowledged());
}

/// Sends what is dirty over one lane and waits until it is there.
fn carry(send_state: &Arc<SendState>, there: &Arc<GuestRam>) -> (Arc<LaneStats>, Arc<LaneStats>) {
    carry_with(send_state, there, (None, None))
}

/// Sends what is dirty over one lane, which these records encrypt, and waits until it is there.
fn carry_with(
    send_state: &Arc<SendState>,
    there: &Arc<GuestRam>,
    (sealing, opening): (Option<Box<Records>>, Option<Box<Records>>),
) -> (Arc<LaneStats>, Arc<LaneStats>) {
    let (near, far) = connection();
    let near = Arc::new(near);
    let transport = Transport { socket: near.clone(), records: sealing };
    let end = Transport { socket: Arc::new(far), records: opening };
    let (sent, received) = (Arc::<LaneStats>::default(), Arc::<LaneStats>::default());
    let lane = (send_state.take_waker().unwrap(), 0);
    std::thread::scope(|scope| {
        let receive_state = Arc::new(ReceiveState { ram: there.clone(), postcopy: None });
        scope.spawn(|| LaneReceiver::new(receive_state, received.clone(), end).unwrap().run());
        scope.spawn(|| {
            LaneSender::new(send_state.clone(), sent.clone(), transport, lane, LONG).unwrap().run()
        });
        until(|| send_state.all_acknowledged());
        crate::socket::hang_up(&*near);
    });
    (sent, received)
}

/// What is there already is received in place, and what is not beside it, in one frame.
#[test]
fn every_page_arrives_whatever_was_there_before() {
    for encrypted in [false, true] {
        every_page_arrives(encrypted);
    }
}

fn every_page_arrives(encrypted: bool) {
    let (here, there) = (ram(), ram());
    // Longer and shorter than what is mapped in one go, and a single one.
    for touched in [10..11, 100..105, 200..260, 1000..1500] {
        touched.for_each(|page| fill_page(&there, page));
    }
    let send_state = Arc::new(SendState::new(here.clone(), silent()));
    for round in 1..=2 {
        (0..PAGES).for_each(|page| write_word(&here, page, page + round * PAGES));
        send_state.dirty.insert_range(0..PAGES);
        // So that there are runs of several lengths.
        (5..PAGES).step_by(190).for_each(|page| _ = send_state.dirty.remove_range(page..page + 3));
        let records = encrypted.then(records).unzip();
        let (sent, _) = carry_with(&send_state, &there, records);
        let wire = sent.wire_bytes.load(Ordering::Relaxed) - sent.acked_bytes.load(Ordering::Relaxed);
        let records = PAGES * PAGE_SIZE / MAX_RECORD_BYTES as u64;
        assert_eq!(wire > records * 22 * 9 / 10, encrypted, "{wire} bytes beside the pages");
        for page in (0..PAGES).filter(|page| !(5..8).contains(&(page % 190))) {
            assert_eq!(first_word(&there, page), page + round * PAGES, "page {page}");
        }
    }
}

/// The two ends of an encrypted connection.
fn records() -> (Box<Records>, Box<Records>) {
    let (directory, authority) = (tempfile::tempdir().unwrap(), Authority::new("test").unwrap());
    let load = |host: &str, peer: &str| {
        let keys = directory.path().join(host);
        authority.issue_to(&keys, host, Validity::days(1)).unwrap();
        let files = KeyFiles { certificate: keys.join(CERTIFICATE), key: keys.join(KEY), ca: keys.join(CA) };
        let peer = PeerAuthority { name: peer.parse().unwrap(), ca: None };
        Credentials::load(&files, &host.parse().unwrap(), &[peer]).unwrap()
    };
    let (a, b) = (load("a", "b"), load("b", "a"));
    let (mut near, mut far) = (a.connect(&"b".parse().unwrap()).unwrap(), b.accept().unwrap());
    while (near.step().unwrap(), far.step().unwrap()) != (Step::Done, Step::Done) {
        far.received(&near.outgoing()).unwrap();
        near.received(&far.outgoing()).unwrap();
    }
    let tickets = far.outgoing();
    let (mut near, far) = (near.finish().unwrap().records, far.finish().unwrap().records);
    near.append(&tickets);
    (near, far)
}

/// Requests may come in one read with the answer to the greeting, and then lie in the records already.
#[test]
fn requests_that_came_along_are_answered() {
    let (here, (near, far)) = (ram(), connection());
    fill(&here);
    let (mut asking, mut answering) = records();
    answering.append(&asking.sealed(&PageRequest::Page(3).encode()).unwrap());
    let transport = Transport { socket: Arc::new(near), records: Some(answering) };
    let send_state = Arc::new(SendState::of_paused_guest(here, silent()));
    let server = PageServer::new(send_state, Arc::default(), transport, LONG).unwrap();
    let served = std::thread::spawn(move || server.run());
    let mut stream = TcpStream::from(far);
    stream.set_read_timeout(Some(LONG)).unwrap();
    let mut frame = Vec::new();
    while frame.len() < FRAME_HEADER_BYTES + RUN_BYTES + PAGE_SIZE as usize {
        let count = stream.read(asking.room()).unwrap();
        assert!(count > 0, "the server has ended");
        asking.received(count);
        asking.read(usize::MAX, &mut frame).unwrap();
    }
    assert_eq!(frame[FRAME_HEADER_BYTES + RUN_BYTES..][..8], 4u64.to_ne_bytes());
    drop(stream);
    assert!(matches!(served.join().unwrap(), LaneError::HungUp | LaneError::Io { .. }));
}

fn allocated_pages(ram: &GuestRam) -> u64 {
    let blocks = ram.descriptors().into_iter().map(|fd| rustix::fs::fstat(fd).unwrap().st_blocks as u64);
    blocks.sum::<u64>() * 512 / PAGE_SIZE
}

#[test]
fn pages_that_were_emptied_are_given_back_at_both_ends() {
    let (here, there) = (ram(), ram());
    fill(&here);
    let send_state = Arc::new(SendState::new(here.clone(), silent()));
    send_state.dirty.insert_range(0..PAGES);
    carry(&send_state, &there);
    assert_eq!(allocated_pages(&here), PAGES, "reading fills holes");
    assert_eq!(allocated_pages(&there), PAGES.div_ceil(3));

    // Another process: this one does not learn of its holes. A page among them is written again.
    let fds = here.descriptors().into_iter().map(|fd| fd.try_clone_to_owned().unwrap());
    let other = GuestRam::map(here.regions().iter().copied().zip(fds).collect()).unwrap();
    other.punch(300..1500).unwrap();
    fill_page(&other, 601);
    send_state.sparse.store(true, Ordering::Relaxed);
    send_state.dirty.insert_range(290..1510);
    let (sent, received) = carry(&send_state, &there);
    for stats in [sent, received] {
        // Of those around the holes, every third holds something.
        assert_eq!(stats.data_pages.load(Ordering::Relaxed), 8);
        assert_eq!(stats.zero_pages.load(Ordering::Relaxed), 1212);
    }
    for page in 0..PAGES {
        let emptied = (300..1500).contains(&page);
        let word = if page == 601 || (page % 3 == 0 && !emptied) { page + 1 } else { 0 };
        // A hole is not read: it would be none any more.
        let hole = there.data_extents_uncached(page..page + 1).unwrap().is_empty();
        assert_eq!(if hole { 0 } else { first_word(&there, page) }, word, "page {page}");
    }
    assert_eq!(allocated_pages(&here), PAGES - 1200 + 1);
    assert_eq!(allocated_pages(&there), PAGES.div_ceil(3) - 400 + 1);
}

/// A frame of page 7, whose bytes lie between two runs that have none, as an LZ4 block of `contents`.
fn compressed(contents: &[u8], checksum: Option<u32>) -> Vec<u8> {
    let run = |pages, content| Run { pages, content };
    let runs = [run(5..7, Content::Zero), run(7..8, Content::Data), run(8..9, Content::Hole)];
    let block = lz4_flex::block::compress(contents);
    let mut frame = Vec::new();
    encode_compressed_head(&mut frame, 1, &runs, checksum, block.len() as u64);
    frame.extend(block);
    frame
}

/// What a receiver into `there` ends with when it has been sent this, and the other end has hung up.
fn received(there: &Arc<GuestRam>, frame: &[u8]) -> LaneError {
    let (near, far) = connection();
    TcpStream::from(near).write_all(frame).unwrap();
    let receive_state = Arc::new(ReceiveState { ram: there.clone(), postcopy: None });
    LaneReceiver::new(receive_state, Arc::default(), Transport::plain(Arc::new(far))).unwrap().run()
}

#[test]
fn compressed_pages_are_written_where_they_belong() {
    let there = ram();
    fill(&there);
    let contents: Vec<u8> =
        (0..PAGE_SIZE as usize / 16).flat_map(|line| [[line as u8; 8], [7; 8]].concat()).collect();
    let ended = received(&there, &compressed(&contents, Some(crc32c::crc32c(&contents))));
    // The acknowledgement may fail, because the other end has closed the connection.
    assert!(matches!(ended, LaneError::HungUp | LaneError::Io { .. }), "{ended}");
    let mut page = [0; PAGE_SIZE as usize];
    assert!(there.copy_page(7, &mut page) && page[..] == contents);
    assert_eq!([3, 5, 6, 8, 9].map(|page| first_word(&there, page)), [4, 0, 0, 0, 10]);
}

#[test]
fn blocks_that_lie_end_the_lane_and_write_nothing() {
    let there = ram();
    let page = vec![7; PAGE_SIZE as usize];
    let cut = |frame: Vec<u8>| {
        // The block is there to its end, says the header, and it is none.
        let head = FRAME_HEADER_BYTES + 3 * RUN_BYTES;
        [&frame[..head], &vec![0xff; frame.len() - head]].concat()
    };
    for (frame, why) in [
        (compressed(&page[1..], None), "the length of the pages in a compressed frame cannot be 4095"),
        (compressed(&page.repeat(100), None), "cannot be decompressed"),
        (cut(compressed(&page, None)), "cannot be decompressed"),
        (compressed(&page, Some(1)), "checksum of the frame"),
    ] {
        let error = received(&there, &frame).to_string();
        assert!(error.contains(why), "{error}");
    }
    assert_eq!(allocated_pages(&there), 0);
}

proptest! {
    /// Whatever is said to be a block: the lane ends, or its page is what a decompressor makes of it.
    #[test]
    fn a_block_may_be_anything(block in prop::collection::vec(any::<u8>(), 1..200)) {
        let there = ram();
        let mut frame = Vec::new();
        let runs = [Run { pages: 7..8, content: Content::Data }];
        encode_compressed_head(&mut frame, 1, &runs, None, block.len() as u64);
        frame.extend(&block);
        received(&there, &frame);
        let mut page = [0; PAGE_SIZE as usize];
        prop_assert!(there.copy_page(7, &mut page));
        let expected = lz4_flex::block::decompress(&block, PAGE_SIZE as usize);
        let expected = expected.ok().filter(|bytes| bytes.len() == page.len());
        prop_assert_eq!(&page[..], &expected.unwrap_or(vec![0; page.len()])[..]);
    }
}
