//! [`Panel`]: two axes, and marks between them.

use super::scale::Scale;
use super::svg::{Anchor, Svg};
use super::unit::Unit;

/// The area between two axes; `y` runs from the bottom up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panel {
    pub(crate) x: Scale,
    pub(crate) y: Scale,
}

/// The room between a tick's label and its axis.
const GAP: f64 = 8.0;
/// The room at the left of a panel, for the labels of its rows.
pub(crate) const GUTTER: f64 = 60.0;
/// The distance from one line of text to the next.
pub(crate) const LINE: f64 = 15.0;

impl Panel {
    /// Returns the place of a value within the panel.
    pub(crate) fn at(&self, x: f64, y: f64) -> (f64, f64) {
        (self.x.at(x), self.y.at(y))
    }

    pub(crate) fn left(&self) -> f64 {
        self.x.places().0
    }

    pub(crate) fn right(&self) -> f64 {
        self.x.places().1
    }

    pub(crate) fn top(&self) -> f64 {
        self.y.places().1
    }

    pub(crate) fn bottom(&self) -> f64 {
        self.y.places().0
    }

    /// Writes above the panel what it shows.
    pub(crate) fn title(&self, svg: &mut Svg, title: &str, rest: &str) {
        let (x, y) = (self.left() - GUTTER, self.top() - 16.0);
        svg.texts((x, y), &[(0.0, "title", title), (10.0, "soft", rest)]);
    }

    /// Draws lines across the panel at about so many round values, which are named at its left. The last one has the
    /// unit.
    pub(crate) fn rows(&self, svg: &mut Svg, unit: Unit, about: usize) {
        let ticks = self.y.ticks(about);
        let multiple = unit.multiple(self.y.values().1);
        for (index, tick) in ticks.iter().enumerate() {
            let y = self.y.at(*tick);
            svg.line(if index == 0 { "axis" } else { "grid" }, &[(self.left(), y), (self.right(), y)]);
            let text = match index + 1 == ticks.len() {
                _ if self.y.is_logarithmic() => unit.multiple(*tick).text(*tick),
                true => multiple.text(*tick),
                false => multiple.number(*tick),
            };
            svg.text("tick", Anchor::End, (self.left() - GAP, y + 4.0), &text);
        }
    }

    /// Writes about so many round values below the panel. The last one has the unit.
    pub(crate) fn columns(&self, svg: &mut Svg, unit: Unit, about: usize) {
        let (ticks, multiple) = (self.x.ticks(about), unit.multiple(self.x.values().1));
        let bottom = self.bottom();
        svg.line("axis", &[(self.left(), bottom), (self.right(), bottom)]);
        for (index, tick) in ticks.iter().enumerate() {
            let x = self.x.at(*tick);
            svg.line("axis", &[(x, bottom), (x, bottom + 4.0)]);
            let text = match index + 1 == ticks.len() {
                _ if self.x.is_logarithmic() => unit.multiple(*tick).text(*tick),
                true => multiple.text(*tick),
                false => multiple.number(*tick),
            };
            svg.text("tick", Anchor::Middle, (x, bottom + 4.0 + LINE), &text);
        }
    }

    /// Writes whole numbers below the panel, all of them if there is room.
    pub(crate) fn whole_columns(&self, svg: &mut Svg) {
        let ((from, to), bottom) = (self.x.values(), self.bottom());
        svg.line("axis", &[(self.left(), bottom), (self.right(), bottom)]);
        let every = ((to - from) * 22.0 / (self.right() - self.left())).ceil().max(1.0) as usize;
        for number in (from.ceil() as i64..=to.floor() as i64).step_by(every) {
            let x = self.x.at(number as f64);
            svg.line("axis", &[(x, bottom), (x, bottom + 4.0)]);
            svg.text("tick", Anchor::Middle, (x, bottom + 4.0 + LINE), &number.to_string());
        }
    }

    /// Writes what the values along the bottom are.
    pub(crate) fn below(&self, svg: &mut Svg, text: &str) {
        let middle = (self.left() + self.right()) / 2.0;
        svg.text("soft", Anchor::Middle, (middle, self.bottom() + 2.0 * LINE + 8.0), text);
    }

    /// Draws a line through values.
    pub(crate) fn line(&self, svg: &mut Svg, class: &str, values: &[(f64, f64)]) {
        let points: Vec<_> = values.iter().map(|(x, y)| self.at(*x, *y)).collect();
        svg.line(class, &points);
    }

    /// Draws values that hold from one place to the next, as a line with steps. The last one only says where the line
    /// ends.
    pub(crate) fn steps(&self, svg: &mut Svg, class: &str, values: &[(f64, f64)]) {
        svg.line(class, &self.corners(values));
    }

    /// Draws values that hold from one place to the next, as a surface down to 0.
    pub(crate) fn filled_steps(&self, svg: &mut Svg, class: &str, values: &[(f64, f64)]) {
        let mut corners = self.corners(values);
        if let (Some(first), Some(last)) = (corners.first().copied(), corners.last().copied()) {
            let bottom = self.y.at(self.y.values().0.max(0.0));
            corners.extend([(last.0, bottom), (first.0, bottom)]);
        }
        svg.surface(class, &corners);
    }

    fn corners(&self, values: &[(f64, f64)]) -> Vec<(f64, f64)> {
        let mut corners: Vec<(f64, f64)> = Vec::new();
        for pair in values.windows(2) {
            let (from, to, y) = (self.x.at(pair[0].0), self.x.at(pair[1].0), self.y.at(pair[0].1));
            // A level that is held on is one line.
            match corners.last_mut() {
                Some(last) if (last.1 - y).abs() < 0.05 => last.0 = to,
                _ => corners.extend([(from, y), (to, y)]),
            }
        }
        corners
    }

    /// Draws a surface over all of the panel's height.
    pub(crate) fn band(&self, svg: &mut Svg, class: &str, (from, to): (f64, f64)) {
        let (from, to) = (self.x.at(from), self.x.at(to));
        // What is short must be seen too.
        let to = to.max(from + 1.0);
        svg.rectangle(class, (from, self.top()), (to - from, self.bottom() - self.top()));
    }

    /// Draws a line over all of the panel's height.
    pub(crate) fn upright(&self, svg: &mut Svg, class: &str, x: f64) {
        let x = self.x.at(x);
        svg.line(class, &[(x, self.top()), (x, self.bottom())]);
    }

    /// Draws a line over all of the panel's width.
    pub(crate) fn level(&self, svg: &mut Svg, class: &str, y: f64) {
        let y = self.y.at(y);
        svg.line(class, &[(self.left(), y), (self.right(), y)]);
    }
}

/// Estimates how wide a text is in small print. Fonts differ, so leave some room.
pub(crate) fn width_of(text: &str) -> f64 {
    let width = |character| match character {
        'i' | 'j' | 'l' | 't' | 'f' | 'r' | ' ' | '.' | ',' | ':' | '|' | '\'' => 0.34,
        'm' | 'w' | 'M' | 'W' | '%' => 0.9,
        'A'..='Z' => 0.68,
        _ => 0.57,
    };
    text.chars().map(width).sum::<f64>() * 12.0
}

/// Finds places for labels that should be at `wanted`, from the smallest on. They are moved as little as is needed to
/// be `apart` from each other.
pub(crate) fn spread(wanted: &[f64], apart: f64, (from, to): (f64, f64)) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|one, other| wanted[*one].total_cmp(&wanted[*other]));
    // Labels that touch make a block, which lies about the middle of where they should be.
    let mut blocks: Vec<(f64, Vec<usize>)> = Vec::new();
    for index in order {
        let mut block = (wanted[index], vec![index]);
        while let Some(before) = blocks.pop_if(|before| {
            let half = apart * (before.1.len() + block.1.len()) as f64 / 2.0;
            block.0 - before.0 < half
        }) {
            let (one, other) = (before.1.len() as f64, block.1.len() as f64);
            block = ((before.0 * one + block.0 * other) / (one + other), [before.1, block.1].concat());
        }
        blocks.push(block);
    }
    let mut places = vec![0.0; wanted.len()];
    for (middle, indices) in blocks {
        let half = apart * (indices.len() as f64 - 1.0) / 2.0;
        let middle = middle.min(to - half).max(from + half);
        for (number, index) in indices.into_iter().enumerate() {
            places[index] = middle - half + number as f64 * apart;
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel() -> Panel {
        Panel { x: Scale::linear((0.0, 10.0), (50.0, 150.0)), y: Scale::linear((0.0, 4.0), (100.0, 20.0)) }
    }

    #[test]
    fn steps_hold_until_the_next() {
        let corners = panel().corners(&[(0.0, 1.0), (2.0, 1.0), (4.0, 3.0), (6.0, 0.0)]);
        assert_eq!(corners, [(50.0, 80.0), (90.0, 80.0), (90.0, 40.0), (110.0, 40.0)]);
        assert!(panel().corners(&[(0.0, 1.0)]).is_empty());
    }

    #[test]
    fn nothing_to_show_draws_nothing() {
        let mut svg = Svg::default();
        panel().steps(&mut svg, "a", &[]);
        panel().filled_steps(&mut svg, "a", &[]);
        panel().line(&mut svg, "a", &[(1.0, 1.0)]);
        assert!(!svg.picture((1.0, 1.0), "", "").contains("<path"));
    }

    #[test]
    fn one_tick_has_the_unit() {
        let mut svg = Svg::default();
        panel().columns(&mut svg, Unit::Seconds, 5);
        let picture = svg.picture((1.0, 1.0), "", "");
        assert_eq!(picture.matches("10 s").count(), 1);
        assert!(picture.contains(">8</text>") && !picture.contains("8 s"), "{picture}");
    }

    #[test]
    fn labels_make_room_for_each_other() {
        assert_eq!(spread(&[10.0, 50.0], 10.0, (0.0, 100.0)), [10.0, 50.0]);
        assert_eq!(spread(&[52.0, 50.0, 51.0], 10.0, (0.0, 100.0)), [61.0, 41.0, 51.0]);
        assert_eq!(spread(&[99.0, 98.0], 10.0, (0.0, 100.0)), [100.0, 90.0]);
        assert!(spread(&[], 10.0, (0.0, 100.0)).is_empty());
    }
}
