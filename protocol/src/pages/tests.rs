//! Each operation against a plain `BTreeSet`, and claims by several threads at once.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;

use super::PageSet;

#[derive(Clone, Debug)]
enum Op {
    Insert(u64),
    InsertRange(u64, u64),
    InsertWord(u64, u64),
    RemoveRange(u64, u64),
    DrainTo(u64, u64),
    Claim(u64, u64),
    Acknowledge,
}

fn op(pages: u64) -> impl Strategy<Value = Op> {
    let page = 0..pages + 70;
    prop_oneof![
        page.clone().prop_map(Op::Insert),
        (page.clone(), page.clone()).prop_map(|(a, b)| Op::InsertRange(a, b)),
        (0..pages / 64 + 3, any::<u64>()).prop_map(|(a, b)| Op::InsertWord(a, b)),
        (page.clone(), page.clone()).prop_map(|(a, b)| Op::RemoveRange(a, b)),
        (page.clone(), page.clone()).prop_map(|(a, b)| Op::DrainTo(a, b)),
        (page, 0..200u64).prop_map(|(a, b)| Op::Claim(a, b)),
        Just(Op::Acknowledge),
    ]
}

proptest! {
    #[test]
    fn behaves_as_a_set(pages in 1..9000u64, ops in proptest::collection::vec(op(9000), 1..60)) {
        let (set, other, flying) = (PageSet::new(pages), PageSet::new(pages), PageSet::new(pages));
        let (mut want, mut want_other, mut want_flying) =
            (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for op in ops {
            match op {
                Op::Insert(page) => prop_assert_eq!(set.insert(page), page < pages && want.insert(page)),
                Op::InsertRange(a, b) => {
                    let new = (a..b.min(pages)).filter(|page| want.insert(*page)).count();
                    prop_assert_eq!(set.insert_range(a..b), new as u64);
                }
                Op::InsertWord(word, bits) => {
                    let marked = (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| word * 64 + bit);
                    let new = marked.filter(|page| *page < pages && want.insert(*page)).count();
                    prop_assert_eq!(set.insert_word(word, bits), new as u64);
                }
                Op::RemoveRange(a, b) => {
                    let gone = (a..b.min(pages)).filter(|page| want.remove(page)).count();
                    prop_assert_eq!(set.remove_range(a..b), gone as u64);
                }
                Op::DrainTo(a, b) => {
                    let moved: Vec<u64> = want.iter().copied().filter(|page| (a..b).contains(page)).collect();
                    let new = moved.iter().filter(|page| { want.remove(page); want_other.insert(**page) }).count();
                    prop_assert_eq!(set.drain_into(a..b, &other), new as u64);
                }
                Op::Claim(from, most) => {
                    let first = want.iter().copied().find(|page| *page >= from && !want_flying.contains(page));
                    let run = set.claim(&flying, from, most);
                    prop_assert_eq!(run.is_some(), first.is_some() && most > 0);
                    if let Some(run) = run {
                        prop_assert_eq!(Some(run.start), first);
                        prop_assert!(run.end - run.start <= most);
                        let stop = run.end;
                        for page in run {
                            prop_assert!(want.remove(&page) && want_flying.insert(page));
                        }
                        let full = stop - first.unwrap() == most;
                        prop_assert!(full || !want.contains(&stop) || want_flying.contains(&stop));
                    }
                }
                Op::Acknowledge => {
                    for run in flying.runs() { flying.remove_range(run); }
                    want_flying.clear();
                }
            }
            prop_assert_eq!(set.count(), want.len() as u64);
            prop_assert_eq!(set.is_empty(), want.is_empty());
            prop_assert_eq!(other.count(), want_other.len() as u64);
        }
        let runs: Vec<_> = set.runs().collect();
        prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        prop_assert_eq!(runs.into_iter().flatten().collect::<Vec<_>>(), want.into_iter().collect::<Vec<_>>());
        set.clear();
        prop_assert!(set.is_empty());
    }

    #[test]
    fn reports_no_page_beyond_the_last(pages in 1..500u64, junk in proptest::collection::vec(any::<u64>(), 16)) {
        let words: Box<[AtomicU64]> = junk.into_iter().map(AtomicU64::new).collect();
        let set = PageSet::over(pages, words).unwrap();
        let (into, flying) = (PageSet::new(pages + 64), PageSet::new(pages));
        prop_assert!(set.count() <= pages);
        prop_assert!(set.runs().all(|run| run.end <= pages));
        while let Some(run) = set.claim(&flying, 0, 3) {
            prop_assert!(run.end <= pages);
        }
        set.drain_into(0..u64::MAX, &into);
        prop_assert!(into.runs().all(|run| run.end <= pages));
    }
}

#[test]
fn refuses_a_mapping_that_is_too_small() {
    let words: Box<[AtomicU64]> = [AtomicU64::new(0), AtomicU64::new(0)].into();
    assert!(PageSet::over(65, words).is_err());
}

/// Four lanes claim and acknowledge while a writer keeps marking. No page may be in two hands
/// at once, and a page marked last must be claimed after that mark.
#[test]
fn many_claimants_lose_no_page_and_share_none() {
    const PAGES: u64 = 1000;
    let (dirty, flying) = (PageSet::new(PAGES), PageSet::new(PAGES));
    let written: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let sent: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let held: Vec<AtomicBool> = (0..PAGES).map(|_| AtomicBool::new(false)).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for lane in 0..4 {
            let (dirty, flying, written, sent, held, done) = (&dirty, &flying, &written, &sent, &held, &done);
            scope.spawn(move || {
                let mut from = lane * PAGES / 4;
                loop {
                    let finished = done.load(Ordering::Acquire);
                    let Some(run) = dirty.claim(flying, from, 7).or_else(|| dirty.claim(flying, 0, 7)) else {
                        if finished && dirty.is_empty() {
                            return;
                        }
                        std::thread::yield_now();
                        continue;
                    };
                    from = run.end % PAGES;
                    for page in run.clone() {
                        assert!(
                            !held[page as usize].swap(true, Ordering::AcqRel),
                            "page {page} is in two hands"
                        );
                        let value = written[page as usize].load(Ordering::Acquire);
                        sent[page as usize].store(value, Ordering::Release);
                        held[page as usize].store(false, Ordering::Release);
                    }
                    flying.remove_range(run);
                }
            });
        }
        for step in 1..200_000u64 {
            let page = step.wrapping_mul(0x9E37_79B9_7F4A_7C15) % PAGES;
            written[page as usize].store(step, Ordering::Release);
            dirty.insert(page);
        }
        done.store(true, Ordering::Release);
    });
    assert!(flying.is_empty());
    for page in 0..PAGES as usize {
        assert_eq!(sent[page].load(Ordering::Relaxed), written[page].load(Ordering::Relaxed), "page {page}");
    }
}
