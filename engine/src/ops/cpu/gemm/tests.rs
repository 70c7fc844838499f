//! Products of every leaf, on this machine's instructions and on modelled ones, against f64.

use proptest::prelude::*;

use super::*;

/// A leaf that can run here.
struct Runnable {
    name: String,
    class: Class,
    leaf: &'static Leaf,
}

fn leaves() -> Vec<Runnable> {
    let runnable = |name: String, class: Class, leaf: &'static Leaf| Runnable { name, class, leaf };
    let mut leaves = Vec::new();
    for class in [Class::Fp32, Class::Bf16] {
        for isa in Isa::available() {
            leaves.push(runnable(format!("{isa:?} {class:?}"), class, Leaf::of(isa, class)));
            // Beside the one that multiplies bf16.
            #[cfg(target_arch = "x86_64")]
            if class == Class::Bf16 && isa.multiplies_bf16() {
                leaves.push(runnable(format!("{isa:?} rounding"), class, &avx512::ROUNDED));
            }
        }
    }
    #[cfg(target_arch = "x86_64")]
    leaves.extend([
        runnable("modelled AVX-512".to_owned(), Class::Fp32, &avx512::modelled::FP32),
        runnable("modelled AVX-512 rounding".to_owned(), Class::Bf16, &avx512::modelled::ROUNDED),
        runnable("modelled AVX512-BF16".to_owned(), Class::Bf16, &avx512::modelled::BF16),
    ]);
    leaves
}

/// How an operand lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
    Bf16,
    Encoded,
}

/// Values as they are, behind [`Decode`].
struct Plain(Vec<f32>);

impl Decode for Plain {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn decode(&self, first: usize, values: &mut [f32]) {
        values.copy_from_slice(&self.0[first..first + values.len()]);
    }
}

/// A matrix inside of a larger one, all around it NaN.
struct Operand {
    f32: Vec<f32>,
    bf16: Vec<bf16>,
    encoded: Plain,
    kind: Kind,
    rows: usize,
    columns: usize,
    margin: usize,
    transposed: bool,
}

impl Operand {
    fn new(
        rows: usize,
        columns: usize,
        transposed: bool,
        kind: Kind,
        margin: usize,
        seed: u32,
    ) -> Self {
        let (memory_rows, memory_columns) =
            if transposed { (columns, rows) } else { (rows, columns) };
        let stride = memory_columns + 2 * margin;
        let mut f32 = vec![f32::NAN; memory_rows * stride];
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        for row in 0..memory_rows {
            for value in &mut f32[row * stride + margin..][..memory_columns] {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *value = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
            }
        }
        let bf16 = f32.iter().map(|&x| bf16::from_f32(x)).collect();
        let encoded = Plain(f32.clone());
        Self { f32, bf16, encoded, kind, rows, columns, margin, transposed }
    }

    fn view(&self) -> MatRef<'_> {
        let elements = match self.kind {
            Kind::F32 => Elements::F32(&self.f32),
            Kind::Bf16 => Elements::Bf16(&self.bf16),
            Kind::Encoded => Elements::Encoded(&self.encoded),
        };
        let (rows, columns) =
            if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) };
        let whole = MatRef::of(elements, rows, columns + 2 * self.margin);
        let view = whole.columns(self.margin..self.margin + columns);
        if self.transposed { view.t() } else { view }
    }

    /// Element (i, j) as the product's class takes it.
    fn value(&self, i: usize, j: usize, class: Class) -> f64 {
        let (row, column) = if self.transposed { (j, i) } else { (i, j) };
        let columns = if self.transposed { self.rows } else { self.columns };
        let value = self.f32[row * (columns + 2 * self.margin) + self.margin + column];
        f64::from(match class {
            Class::Fp32 => value,
            Class::Bf16 => bf16::from_f32(value).to_f32(),
        })
    }
}

#[derive(Debug, Clone, Copy)]
enum BaseKind {
    Nothing,
    Itself,
    Other,
}

struct Case {
    m: usize,
    n: usize,
    k: usize,
    /// That of the second pair, which lies the other way around; 0 for none.
    more: usize,
    transposed: [bool; 2],
    kinds: [Kind; 2],
    margin: usize,
    base: BaseKind,
    alpha: f32,
}

const SENTINEL: f32 = 12_345.0;

/// C with a margin of sentinels, from `leaf`.
fn compute(
    case: &Case,
    leaf: &'static Leaf,
    [a, b]: &[Operand; 2],
    more: &[Operand; 2],
    base: &[f32],
) -> Vec<f32> {
    let &Case { m, n, margin, alpha, .. } = case;
    let stride = n + 2 * margin;
    let mut c = vec![SENTINEL; m * stride];
    for i in 0..m {
        c[i * stride + margin..][..n].copy_from_slice(&base[i * n..][..n]);
    }
    let view = MatMut::new(&mut c, m, stride).columns(margin..margin + n);
    let target = view.target(match case.base {
        BaseKind::Nothing => Base::Nothing,
        BaseKind::Itself => Base::Itself,
        BaseKind::Other => Base::Other(base),
    });
    let more = (case.more > 0).then(|| more.each_ref().map(Operand::view));
    let operands = Operands { a: a.view(), b: b.view(), more };
    // SAFETY: the view of a unique borrow; `leaves` lists only what this CPU has.
    unsafe { write(target, alpha, operands, Threads::Shared, Some(leaf)) }
    c
}

fn check(case: &Case) {
    let &Case { m, n, k, more, transposed, kinds, margin, base: base_kind, alpha } = case;
    let operands = |k: usize, transposed: [bool; 2], kinds: [Kind; 2], seed: u32| {
        [
            Operand::new(m, k, transposed[0], kinds[0], margin, seed),
            Operand::new(k, n, transposed[1], kinds[1], margin, seed + 1),
        ]
    };
    let first = operands(k, transposed, kinds, 1);
    let second = operands(more, transposed.map(|is| !is), [kinds[1], kinds[0]], 3);
    let base: Vec<f32> = (0..m * n).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
    for Runnable { name, class, leaf } in leaves() {
        // An f32 leaf takes only f32, as `write` sees to.
        if class == Class::Fp32 && kinds.contains(&Kind::Bf16) {
            continue;
        }
        let c = compute(case, leaf, &first, &second, &base);
        let stride = n + 2 * margin;
        for i in 0..m {
            let row = &c[i * stride..][..stride];
            let (left, right) = (&row[..margin], &row[margin + n..]);
            assert!(left.iter().chain(right).all(|&x| x == SENTINEL), "{name}: margin");
            for j in 0..n {
                let terms = [(&first, k), (&second, more)].into_iter().flat_map(|([a, b], k)| {
                    (0..k).map(|p| a.value(i, p, class) * b.value(p, j, class))
                });
                let (sum, size) =
                    terms.fold((0.0, 0.0), |(sum, size): (f64, f64), x| (sum + x, size + x.abs()));
                let added = match base_kind {
                    BaseKind::Nothing => 0.0,
                    BaseKind::Itself | BaseKind::Other => f64::from(base[i * n + j]),
                };
                let expected = f64::from(alpha) * sum + added;
                let error = (f64::from(row[margin + j]) - expected).abs();
                // Each of the k steps may round by 2⁻²⁴ of what was summed so far.
                let rounding = size * ((k + more) as f64).sqrt();
                let bound = 1e-7 * (1.0 + added.abs() + f64::from(alpha).abs() * rounding);
                assert!(
                    error <= bound,
                    "{name} at ({i}, {j}) of {m} x {n} x {k}: {} instead of {expected}",
                    row[margin + j]
                );
            }
        }
    }
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::F32), Just(Kind::Bf16), Just(Kind::Encoded)]
}

/// Few and many: both sides of the limits at which operands are read where they lie.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![1..9usize, 14..19usize, 28..40usize, 60..110usize]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn product_of_any_shape_layout_and_element_is_that_of_f64(
        m in length(), n in length(), k in length(),
        more in prop_oneof![Just(0), 1..40usize],
        transposed in any::<[bool; 2]>(), kinds in [kind(), kind()],
        margin in 0..4usize, base in 0..3usize,
        alpha in prop_oneof![Just(1.0f32), -2.0..2.0f32],
    ) {
        let base = [BaseKind::Nothing, BaseKind::Itself, BaseKind::Other][base];
        check(&Case { m, n, k, more, transposed, kinds, margin, base, alpha });
    }
}

#[test]
fn several_blocks_of_k_add_up_onto_every_base() {
    for base in [BaseKind::Nothing, BaseKind::Itself, BaseKind::Other] {
        for transposed in [[false, true], [false, false], [true, false]] {
            for (m, n) in [(7, 100), (100, 5), (33, 70)] {
                let kinds = [Kind::F32; 2];
                for more in [0, 17] {
                    let case = Case {
                        m,
                        n,
                        k: 1001,
                        more,
                        transposed,
                        kinds,
                        margin: 1,
                        base,
                        alpha: 0.5,
                    };
                    check(&case);
                }
            }
        }
    }
}

#[test]
fn pairs_of_bf16_are_read_where_they_lie_in_several_blocks() {
    for k in [1002, 1001] {
        let kinds = [Kind::Bf16, Kind::F32];
        let base = BaseKind::Nothing;
        let transposed = [false, true];
        check(&Case { m: 31, n: 5, k, more: 0, transposed, kinds, margin: 0, base, alpha: 1.0 });
        let kinds = [Kind::F32, Kind::Bf16];
        check(&Case { m: 3, n: 50, k, more: 0, transposed, kinds, margin: 2, base, alpha: 1.0 });
    }
}

#[test]
fn groups_of_rows_and_of_columns_cover_large_products() {
    // More rows, or columns, than one group holds; sums of integers are exact.
    for (m, n) in [(4500, 70), (70, 4500), (2100, 2100)] {
        let values = |count: usize, step: usize| -> Vec<f32> {
            (0..count).map(|i| (i * step % 13) as f32 - 6.0).collect()
        };
        let (a, b) = (values(m * 3, 7), values(3 * n, 5));
        let c = product(1.0, MatRef::new(&a, m, 3), MatRef::new(&b, 3, n), Threads::Shared);
        for (i, row) in c.chunks_exact(n).enumerate() {
            for (j, &value) in row.iter().enumerate() {
                let expected: f32 = (0..3).map(|p| a[i * 3 + p] * b[p * n + j]).sum();
                assert_eq!(value, expected, "({i}, {j})");
            }
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    for kinds in [[Kind::F32; 2], [Kind::F32, Kind::Bf16]] {
        for transposed in [[false, true], [false, false], [true, false]] {
            for (m, n, k) in [(150, 130, 700), (700, 16, 600), (9, 900, 700)] {
                let a = Operand::new(m, k, transposed[0], kinds[0], 0, 3);
                let b = Operand::new(k, n, transposed[1], kinds[1], 0, 4);
                let run = |threads: usize| {
                    let pool =
                        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    pool.install(|| product(1.0, a.view(), b.view(), Threads::Shared))
                };
                let alone = bits(&run(1));
                assert_eq!(alone, bits(&run(2)));
                assert_eq!(alone, bits(&run(3)));
            }
        }
    }
}

#[test]
fn bits_of_a_row_do_not_depend_on_the_rows_beside_it() {
    let (m, n, k) = (97, 200, 900);
    let a = Operand::new(m, k, false, Kind::F32, 0, 5);
    for transposed in [false, true] {
        let b = Operand::new(k, n, transposed, Kind::F32, 0, 6);
        let all = product(1.0, a.view(), b.view(), Threads::Shared);
        for rows in [0..6, 5..13, 20..97] {
            let some = product(1.0, a.view().rows(rows.clone()), b.view(), Threads::One);
            assert_eq!(bits(&all[rows.start * n..rows.end * n]), bits(&some), "rows {rows:?}");
        }
    }
}

#[test]
fn rounding_to_bf16_is_to_nearest_even_and_keeps_nan() {
    for high in 0..=u32::from(u16::MAX) {
        for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let bits = high << 16 | low;
            let expected = u32::from(bf16::from_f32(f32::from_bits(bits)).to_bits()) << 16;
            assert_eq!(pack::round_to_bf16(bits), expected, "{bits:#x}");
        }
    }
}

#[test]
fn product_over_nothing_is_zero_or_its_base() {
    let (a, b) = (MatRef::new(&[], 2, 0), MatRef::new(&[], 0, 3));
    assert_eq!(product(1.0, a, b, Threads::Shared), [0.0; 6]);
    let base = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    assert_eq!(product_plus(&base, 1.0, a, b, Threads::Shared), base);
    let mut c = base;
    gemm_add(MatMut::new(&mut c, 2, 3), 1.0, a, b, Threads::One);
    assert_eq!(c, base);
    let nothing = product(1.0, MatRef::new(&[], 0, 3), MatRef::new(&[], 3, 0), Threads::One);
    assert!(nothing.is_empty());
}

#[test]
#[should_panic(expected = "leaves its")]
fn view_that_leaves_its_slice_is_refused() {
    let data = [0.0; 6];
    let view = MatRef { stride: 4, ..MatRef::new(&data, 2, 3) };
    let _ = product(1.0, view, MatRef::new(&[0.0; 3], 3, 1), Threads::One);
}

#[test]
#[should_panic(expected = "inner dimension")]
fn operands_that_do_not_fit_are_refused() {
    let data = [0.0; 6];
    let _ = product(1.0, MatRef::new(&data, 2, 3), MatRef::new(&data, 2, 3), Threads::One);
}
