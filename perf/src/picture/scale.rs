//! [`Scale`]: from values to places, and the values that an axis names.

/// A scale, which says where values lie along an axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scale {
    values: (f64, f64),
    places: (f64, f64),
    logarithmic: bool,
}

impl Scale {
    /// Makes a scale on which equal differences take equal room.
    pub(crate) fn linear(values: (f64, f64), places: (f64, f64)) -> Self {
        Self { values: apart(values, 1.0), places, logarithmic: false }
    }

    /// Makes a scale from 0 to a round value that hardly any of `values` is beyond.
    pub(crate) fn from_zero(values: impl IntoIterator<Item = f64>, places: (f64, f64)) -> Self {
        let largest = values.into_iter().filter(|value| value.is_finite()).fold(0.0, f64::max);
        let largest = if largest > 0.0 { largest } else { 1.0 };
        let step = step(largest, 4);
        Self::linear((0.0, (largest / step - 0.06).ceil() * step), places)
    }

    /// Makes a scale on which equal ratios take equal room. Values should be above 0; others lie at the beginning.
    pub(crate) fn logarithmic(values: (f64, f64), places: (f64, f64)) -> Self {
        let from = values.0.max(f64::MIN_POSITIVE);
        Self { values: apart((from, values.1.max(from)), from), places, logarithmic: true }
    }

    /// Returns the first value and the last.
    pub(crate) fn values(&self) -> (f64, f64) {
        self.values
    }

    /// Returns the first place and the last.
    pub(crate) fn places(&self) -> (f64, f64) {
        self.places
    }

    /// Returns whether equal ratios take equal room.
    pub(crate) fn is_logarithmic(&self) -> bool {
        self.logarithmic
    }

    /// Returns the place of a value. A value beyond the end has the place of the end.
    pub(crate) fn at(&self, value: f64) -> f64 {
        let (from, to) = self.values;
        let share = match self.logarithmic {
            true => (value.max(from) / from).ln() / (to / from).ln(),
            false => (value - from) / (to - from),
        };
        let share = if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) };
        self.places.0 + share * (self.places.1 - self.places.0)
    }

    /// Returns about so many round values. On a logarithmic scale they are those of 1, 2 and 5, or of 1 alone.
    pub(crate) fn ticks(&self, about: usize) -> Vec<f64> {
        let (from, to) = self.values;
        if self.logarithmic {
            let decades = from.log10().floor() as i32..=to.log10().ceil() as i32;
            let digits: &[f64] =
                if (to / from).log10() > about as f64 / 2.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
            let ticks = decades.flat_map(|decade| digits.iter().map(move |digit| digit * 10f64.powi(decade)));
            return ticks.filter(|tick| (from * 0.999..=to * 1.001).contains(tick)).collect();
        }
        let step = step(to - from, about);
        let first = (from / step - 1e-6).ceil() as i64;
        let last = (to / step + 1e-6).floor() as i64;
        (first..=last).map(|number| number as f64 * step).collect()
    }
}

/// Returns 1, 2 or 5 times a power of ten, so that about so many of it make `whole`, and no more than twice as many.
fn step(whole: f64, about: usize) -> f64 {
    let rough = whole / about.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let digit = [1.0, 2.0, 5.0, 10.0].into_iter().find(|digit| digit * power >= rough * 0.999);
    digit.unwrap_or(10.0) * power
}

/// Returns two ends that differ, so that there is something to divide by.
fn apart((from, to): (f64, f64), by: f64) -> (f64, f64) {
    if to > from { (from, to) } else { (from, from + by) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        let ticks = |to, about| Scale::linear((0.0, to), (0.0, 100.0)).ticks(about);
        assert_eq!(ticks(10.0, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(7.3, 4), [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(ticks(0.3, 3).len(), 4);
        let around = Scale::linear((-31.0, 52.0), (0.0, 1.0)).ticks(4);
        assert_eq!(around, [0.0, 50.0]);
    }

    #[test]
    fn logarithmic_ticks_are_ones_twos_and_fives_or_ones() {
        let scale = Scale::logarithmic((1e-5, 1e-2), (0.0, 300.0));
        let near = |one: f64, two: f64| (one / two - 1.0).abs() < 1e-9;
        let ticks = scale.ticks(4);
        assert!(
            ticks.len() == 4 && ticks.iter().zip([1e-5, 1e-4, 1e-3, 1e-2]).all(|(one, two)| near(*one, two))
        );
        assert_eq!(scale.ticks(12).len(), 10);
        assert!((scale.at(1e-4) - 100.0).abs() < 1e-9);
        assert_eq!(scale.at(0.0), 0.0);
    }

    #[test]
    fn a_scale_from_zero_ends_with_a_tick_though_a_value_may_stand_out_a_little() {
        let scale = |values: &[f64]| Scale::from_zero(values.iter().copied(), (0.0, 1.0)).values().1;
        assert_eq!(
            [scale(&[3.0, 9.4]), scale(&[10.1]), scale(&[f64::NAN, 0.11])],
            [10.0, 10.0, 0.15000000000000002]
        );
        assert_eq!([scale(&[]), scale(&[0.0])], [1.0, 1.0]);
    }

    #[test]
    fn everything_has_a_place() {
        let scale = Scale::linear((5.0, 5.0), (100.0, 0.0));
        assert_eq!(
            [5.0, 5.5, 99.0, -7.0, f64::NAN].map(|value| scale.at(value)),
            [100.0, 50.0, 0.0, 100.0, 100.0]
        );
        let scale = Scale::logarithmic((0.0, 0.0), (0.0, 10.0));
        assert!(scale.at(3.0) == 10.0 && scale.at(-1.0) == 0.0);
    }
}
