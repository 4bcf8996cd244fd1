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
    RemoveWord(u64, u64),
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
        check(pages, ops)?;
    }

    /// With several words of the top, and operations on both sides of where they, the words under them, and
    /// those under these meet.
    #[test]
    fn behaves_as_a_set_where_words_of_each_level_meet(
        pages in 700_000..800_000u64,
        ops in proptest::collection::vec(op_far_apart(), 1..40),
    ) {
        check(pages, ops)?;
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

/// A page close to where words of some level meet.
fn corner() -> impl Strategy<Value = u64> {
    let unit = prop_oneof![Just(64u64), Just(4096), Just(262_144)];
    (unit, 0..4u64, 0..5u64).prop_map(|(unit, times, beyond)| (unit * times + beyond).saturating_sub(2))
}

fn op_far_apart() -> impl Strategy<Value = Op> {
    let length = prop_oneof![0..200u64, 0..9000u64];
    prop_oneof![
        corner().prop_map(Op::Insert),
        (corner(), length.clone()).prop_map(|(a, more)| Op::InsertRange(a, a + more)),
        (corner(), any::<u64>()).prop_map(|(a, b)| Op::InsertWord(a / 64, b)),
        (corner(), any::<u64>()).prop_map(|(a, b)| Op::RemoveWord(a / 64, b)),
        (corner(), length.clone()).prop_map(|(a, more)| Op::RemoveRange(a, a + more)),
        (corner(), corner()).prop_map(|(a, b)| Op::DrainTo(a, b)),
        (corner(), 0..200u64).prop_map(|(a, b)| Op::Claim(a, b)),
        Just(Op::Acknowledge),
    ]
}

/// Does the same to sets and to `BTreeSet`s.
fn check(pages: u64, ops: Vec<Op>) -> Result<(), TestCaseError> {
    let (set, other, flying) = (PageSet::new(pages), PageSet::new(pages), PageSet::new(pages));
    let (mut want, mut want_other, mut want_flying) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
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
            Op::RemoveWord(word, bits) => {
                set.remove_word(word, bits);
                want.retain(|page| page / 64 != word || bits >> (page % 64) & 1 == 0);
            }
            Op::RemoveRange(a, b) => {
                let gone = (a..b.min(pages)).filter(|page| want.remove(page)).count();
                prop_assert_eq!(set.remove_range(a..b), gone as u64);
            }
            Op::DrainTo(a, b) => {
                let moved: Vec<u64> = want.iter().copied().filter(|page| (a..b).contains(page)).collect();
                let new = moved
                    .iter()
                    .filter(|page| {
                        want.remove(page);
                        want_other.insert(**page)
                    })
                    .count();
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
                for run in flying.runs() {
                    flying.remove_range(run);
                }
                want_flying.clear();
            }
        }
        prop_assert_eq!(set.count(), want.len() as u64);
        prop_assert_eq!(set.is_empty(), want.is_empty());
        prop_assert_eq!(other.count(), want_other.len() as u64);
    }
    let runs: Vec<_> = set.runs().collect();
    prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
    let part = pages / 3..pages - pages / 5;
    let in_words = set.words(part.clone()).flat_map(|(word, bits)| {
        (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * 64 + bit)
    });
    prop_assert_eq!(in_words.collect::<Vec<_>>(), want.range(part).copied().collect::<Vec<_>>());
    prop_assert_eq!(runs.into_iter().flatten().collect::<Vec<_>>(), want.into_iter().collect::<Vec<_>>());
    set.clear();
    prop_assert!(set.is_empty());
    Ok(())
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

/// Threads add, and one takes, all under few words of each level, which so fill and empty all the time. What was
/// not taken by then is found when all is quiet.
#[test]
fn what_is_added_while_others_take_is_not_hidden_in_the_end() {
    const PAGES: u64 = 1 << 20;
    for round in 0..200u64 {
        let (set, taken) = (PageSet::new(PAGES), PageSet::new(PAGES));
        let page =
            |number: u64| (number % 4) * 262_144 + (number % 8 / 4) * 4096 + (number % 16 / 8) * 64 + number;
        let adding = AtomicU64::new(3);
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (set, adding) = (&set, &adding);
                scope.spawn(move || {
                    (0..20).for_each(|step| assert!(set.insert(page(thread * 20 + step))));
                    adding.fetch_sub(1, Ordering::AcqRel);
                });
            }
            while adding.load(Ordering::Acquire) > 0 {
                set.drain_into(0..PAGES, &taken);
            }
        });
        set.drain_into(0..PAGES, &taken);
        assert_eq!(taken.count(), 60, "round {round}");
        assert!(set.is_empty() && (0..60).all(|number| taken.contains(page(number))));
    }
}

#[test]
fn a_huge_set_is_as_quick_as_what_it_holds() {
    const PAGES: u64 = (24 << 40) / super::PAGE_SIZE;
    let (set, flying) = (PageSet::new(PAGES), PageSet::new(PAGES));
    let held = [0, 4095, 4096, 262_144, PAGES / 2, PAGES - 1];
    assert!(held.iter().all(|page| set.insert(*page)));
    // Each of these would take minutes if it went through all pages.
    for _ in 0..1000 {
        assert!(set.count() == 6 && !set.is_empty() && flying.is_empty());
        assert_eq!(set.next_run(PAGES / 2 + 1, u64::MAX), Some(PAGES - 1..PAGES));
    }
    assert_eq!(set.runs().flatten().collect::<Vec<_>>(), [0, 4095, 4096, 262_144, PAGES / 2, PAGES - 1]);
    assert_eq!(set.claim(&flying, PAGES / 2 + 1, 9), Some(PAGES - 1..PAGES));
    assert_eq!(set.drain_into(0..PAGES, &flying), 5);
    set.clear();
    assert!(set.is_empty() && flying.count() == 6);
}

#[test]
fn a_run_within_a_range_ends_with_it_and_none_beyond_is_found() {
    const PAGES: u64 = 10_000;
    let set = PageSet::new(PAGES);
    set.insert_range(10..300);
    set.insert_range(PAGES - 70..PAGES);
    assert_eq!(set.next_run_within(0..20), Some(10..20));
    assert_eq!(set.next_run_within(100..PAGES), Some(100..300));
    assert_eq!(set.next_run_within(PAGES - 3..PAGES + 9), Some(PAGES - 3..PAGES));
    for nothing in [0..10, 300..PAGES - 70, 20..20, PAGES..PAGES + 1, 0..0] {
        assert_eq!(set.next_run_within(nothing), None);
    }
}
