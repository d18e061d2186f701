//! The embedding layer:
//! `x_t = word_embeddings[id_t] + position_embeddings[offset + position_t] + token_type_embeddings[0]`.
//!
//! Backward adds each row of dx to the rows of the gradients that it was looked up from. The threads divide
//! the rows of a gradient among them, not the tokens, and add the tokens of a row in their order. So the
//! result has the same bits for any number of threads, without atomics.

use crate::rows::{add, new_rows, take};
use crate::simd::{fill_rows, rows_per_task, vectorised};
use crate::tensor::{expect_shape, matrix, packed, read, tensor, write};
use crate::{Packing, linear};
use candle_core::{IndexOp, Result, Tensor, bail};
use rayon::prelude::*;
use std::iter::zip;

#[cfg(any(test, gpu))]
mod gpu;

/// The embedding tables, with the names that they have in BERT's checkpoints.
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a> {
    /// `(V, D)`, indexed by token id.
    pub word_embeddings: &'a Tensor,
    /// `(P, D)`, indexed by the position in the sequence plus `position_offset`. `None` for rotary positions.
    pub position_embeddings: Option<&'a Tensor>,
    /// The row of `position_embeddings` for position 0. It is 2 in RoBERTa, which reserves two rows for
    /// padding.
    pub position_offset: usize,
    /// `(token types, D)`. Only row 0 is used: every text is one segment.
    pub token_type_embeddings: Option<&'a Tensor>,
}

/// Returns the embeddings x `(T, D)` of the token ids `ids` `(T)`, which are u32.
///
/// # Errors
/// If an id (on a CPU) or a position lies outside its table, a shape differs from the above, or a tensor is
/// not contiguous.
pub fn forward(ids: &Tensor, packing: &Packing, tables: &Tables) -> Result<Tensor> {
    let tokens = packing.tokens();
    let (words, width) = matrix("word_embeddings", tables.word_embeddings)?;
    expect_shape("ids", ids, &[tokens])?;
    if let Some(position) = tables.position_embeddings {
        expect_positions(position, packing, tables.position_offset, width)?;
    }
    if let Some(token_type) = tables.token_type_embeddings {
        expect_token_types(token_type, width)?;
    }
    #[cfg(gpu)]
    if crate::gpu::runs(tables.word_embeddings.device()) {
        return gpu::forward(ids, packing, tables);
    }
    let (ids, word) = (read::<u32>(ids)?, read::<f32>(tables.word_embeddings)?);
    let (ids, word) = (&*ids, &*word);
    expect_ids(ids, words)?;
    let position = tables.position_embeddings.map(read::<f32>).transpose()?;
    let token_type = tables.token_type_embeddings.map(read::<f32>).transpose()?;
    let (position, token_type) = (position.as_deref(), token_type.as_deref());

    let [x] = new_rows(
        tokens,
        [width],
        #[inline(always)]
        |t, [x]| {
            let mut x = x.fill(word[ids[t] as usize * width..][..width].iter().copied());
            if let Some(position) = position {
                add(&mut x, &position[(tables.position_offset + packing.locate(t).1) * width..][..width]);
            }
            if let Some(token_type) = token_type {
                add(&mut x, &token_type[..width]);
            }
            [x]
        },
    );
    tensor(x, (tokens, width))
}

/// Backward pass of [`forward`]: adds the gradients of the tables to `d_word` `(V, D)`, `d_position` `(P, D)`
/// and `d_token_type` `(token types, D)`; pass `None` for a frozen table. `dx` `(T, D)` is the gradient of x.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dx: &Tensor,
    ids: &Tensor,
    packing: &Packing,
    position_offset: usize,
    d_word: Option<&Tensor>,
    d_position: Option<&Tensor>,
    d_token_type: Option<&Tensor>,
) -> Result<()> {
    let (tokens, width) = packed("dx", dx, packing)?;
    if let Some(d_word) = d_word {
        let (words, _) = matrix("d_word", d_word)?;
        expect_shape("d_word", d_word, &[words, width])?;
        expect_shape("ids", ids, &[tokens])?;
    }
    if let Some(d_position) = d_position {
        expect_positions(d_position, packing, position_offset, width)?;
    }
    if let Some(d_token_type) = d_token_type {
        expect_token_types(d_token_type, width)?;
    }
    #[cfg(gpu)]
    if crate::gpu::runs(dx.device()) {
        return gpu::backward(dx, ids, packing, position_offset, d_word, d_position, d_token_type);
    }
    let dxs = read::<f32>(dx)?;
    let dxs = &*dxs;
    if let Some(d_word) = d_word {
        let ids = read::<u32>(ids)?;
        expect_ids(&ids, d_word.dims()[0])?;
        write(d_word, |d_word| add_words(d_word, width, &ids, dxs))?;
    }
    if let Some(d_position) = d_position {
        write(d_position, |d_position| {
            let rows = &mut d_position[position_offset * width..][..packing.longest() * width];
            fill_rows(
                rows,
                width,
                #[inline(always)]
                |position, row| {
                    for range in packing.ranges().filter(|range| position < range.len()) {
                        add(row, &dxs[(range.start + position) * width..][..width]);
                    }
                },
            );
        })?;
    }
    if let Some(d_token_type) = d_token_type {
        // Every token has token type 0, so the gradient of that row is the one of a bias.
        linear::backward_bias(dx, &d_token_type.i(0)?)?;
    }
    Ok(())
}

/// Adds row t of `dx` to row `ids[t]` of `table`; all rows have `width` elements.
fn add_words(table: &mut [f32], width: usize, ids: &[u32], dx: &[f32]) {
    // Sorted by id, and the tokens of an id in their order.
    let mut order: Vec<(u32, u32)> = zip(ids.iter().copied(), 0..).collect();
    order.par_sort_unstable();

    // Pieces with about the same number of tokens. No two pieces share an id, so each piece has its own rows
    // of the table.
    let fair = rows_per_task(order.len(), width);
    let mut pieces = Vec::new();
    let (mut left, mut rows, mut first) = (order.as_slice(), table, 0);
    while !left.is_empty() {
        let mut end = fair.min(left.len());
        while end < left.len() && left[end].0 == left[end - 1].0 {
            end += 1;
        }
        let (piece, later) = left.split_at(end);
        let next = piece[end - 1].0 as usize + 1;
        pieces.push((piece, take(&mut rows, (next - first) * width), first));
        (left, first) = (later, next);
    }
    pieces.into_par_iter().for_each(|(piece, rows, first)| {
        vectorised(
            #[inline(always)]
            || {
                for &(id, t) in piece {
                    add(
                        &mut rows[(id as usize - first) * width..][..width],
                        &dx[t as usize * width..][..width],
                    );
                }
            },
        );
    });
}

fn expect_ids(ids: &[u32], words: usize) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= words) {
        Some(t) => bail!("token {t} has the id {}, but `word_embeddings` has {words} rows", ids[t]),
        None => Ok(()),
    }
}

fn expect_positions(table: &Tensor, packing: &Packing, offset: usize, width: usize) -> Result<()> {
    let (positions, _) = matrix("position_embeddings", table)?;
    expect_shape("position_embeddings", table, &[positions, width])?;
    if packing.longest() + offset > positions {
        bail!(
            "a sequence has {} tokens, but `position_embeddings` has {positions} rows, {offset} unused",
            packing.longest()
        );
    }
    Ok(())
}

fn expect_token_types(table: &Tensor, width: usize) -> Result<()> {
    let (token_types, _) = matrix("token_type_embeddings", table)?;
    if token_types == 0 {
        bail!("`token_type_embeddings` has no rows");
    }
    expect_shape("token_type_embeddings", table, &[token_types, width])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{finite_difference, inner, numbers, random, relative_error};
    use candle_core::Device;

    /// Ids below 11, some of which occur often and some never.
    pub(super) fn ids(tokens: usize) -> Vec<u32> {
        (0..tokens).map(|t| (t * t % 11) as u32).collect()
    }

    pub(super) fn id_tensor(ids: &[u32]) -> Tensor {
        Tensor::new(ids, &Device::Cpu).unwrap()
    }

    pub(super) fn reference(
        ids: &[u32],
        packing: &Packing,
        width: usize,
        offset: usize,
        word: &[f64],
        position: &[f64],
        token_type: &[f64],
    ) -> Vec<f64> {
        let mut x = Vec::new();
        for (t, &id) in ids.iter().enumerate() {
            let p = packing.locate(t).1 + offset;
            x.extend(
                (0..width).map(|d| word[id as usize * width + d] + position[p * width + d] + token_type[d]),
            );
        }
        x
    }

    #[test]
    fn values_equal_the_reference_for_odd_and_empty_shapes() {
        for (lengths, width) in
            [(vec![], 3), (vec![2], 0), (vec![1], 1), (vec![3, 0, 7], 7), (vec![1023, 5], 33)]
        {
            let packing = Packing::new(&lengths, vec![0; lengths.len()]);
            let ids = ids(packing.tokens());
            let (word, position, token_type) =
                (random(1, (11, width)), random(2, (1025, width)), random(3, (2, width)));
            let tables = Tables {
                word_embeddings: &word,
                position_embeddings: Some(&position),
                position_offset: 2,
                token_type_embeddings: Some(&token_type),
            };
            let want = reference(
                &ids,
                &packing,
                width,
                2,
                &numbers(&word),
                &numbers(&position),
                &numbers(&token_type),
            );
            // Two additions in f32.
            let x = forward(&id_tensor(&ids), &packing, &tables).unwrap();
            assert!(relative_error(&x, &want) < 2e-7, "{lengths:?} {width}");

            let tables = Tables {
                word_embeddings: &word,
                position_embeddings: None,
                position_offset: 0,
                token_type_embeddings: None,
            };
            let zeros = vec![0.0; 1023 * width];
            let want = reference(&ids, &packing, width, 0, &numbers(&word), &zeros, &zeros);
            assert_eq!(numbers(&forward(&id_tensor(&ids), &packing, &tables).unwrap()), want);
        }
    }

    #[test]
    fn gradients_equal_finite_differences_and_are_added() {
        let (packing, width, offset) = (Packing::new(&[3, 0, 5, 1], vec![0; 4]), 3, 1);
        let ids = ids(9);
        let (word, position, token_type) =
            (random(1, (11, width)), random(2, (7, width)), random(3, (2, width)));
        let dx = random(4, (9, width));
        let (words, positions, token_types, dxs) =
            (numbers(&word), numbers(&position), numbers(&token_type), numbers(&dx));
        let loss =
            |w: &[f64], p: &[f64], k: &[f64]| inner(&reference(&ids, &packing, width, offset, w, p, k), &dxs);
        let want = [
            finite_difference(&words, |w| loss(w, &positions, &token_types)),
            finite_difference(&positions, |p| loss(&words, p, &token_types)),
            finite_difference(&token_types, |k| loss(&words, &positions, k)),
        ];
        let got = [random(5, (11, width)), random(6, (7, width)), random(7, (2, width))];
        let want: Vec<Vec<f64>> = zip(&got, want)
            .map(|(got, want)| zip(numbers(got), want).map(|(a, b)| a + b).collect())
            .collect();
        let [d_word, d_position, d_token_type] = &got;
        backward(&dx, &id_tensor(&ids), &packing, offset, Some(d_word), Some(d_position), Some(d_token_type))
            .unwrap();
        for (got, want) in zip(&got, &want) {
            assert!(relative_error(got, want) < 3e-7);
        }
    }

    #[test]
    fn gradients_do_not_depend_on_the_number_of_threads() {
        let (packing, width) = (Packing::new(&[4000, 97], vec![0; 2]), 40);
        let (dx, ids) = (random(1, (4097, width)), id_tensor(&ids(4097)));
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let gradients = [(11, width), (4000, width), (2, width)].map(|shape| random(2, shape));
            let [word, position, token_type] = &gradients;
            pool.install(|| {
                backward(&dx, &ids, &packing, 0, Some(word), Some(position), Some(token_type)).unwrap()
            });
            gradients.map(|gradient| numbers(&gradient))
        };
        let one = on(1);
        assert_eq!(one, on(2));
        assert_eq!(one, on(5));

        // The same additions in f32, one after the other in the order of the tokens.
        let (dxs, ids) = (dx.flatten_all().unwrap().to_vec1::<f32>().unwrap(), ids.to_vec1::<u32>().unwrap());
        let mut plain = random(2, (11, width)).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (t, id) in ids.iter().enumerate() {
            for d in 0..width {
                plain[*id as usize * width + d] += dxs[t * width + d];
            }
        }
        assert_eq!(one[0], plain.into_iter().map(f64::from).collect::<Vec<_>>());
    }

    #[test]
    fn ids_and_positions_outside_their_tables_are_errors() {
        let (word, position) = (random(1, (11, 3)), random(2, (4, 3)));
        let tables = Tables {
            word_embeddings: &word,
            position_embeddings: Some(&position),
            position_offset: 2,
            token_type_embeddings: None,
        };
        let (two, three) = (Packing::new(&[2], vec![0]), Packing::new(&[3], vec![0]));
        let error = forward(&id_tensor(&[1, 11]), &two, &tables).unwrap_err().to_string();
        assert!(error.contains("token 1") && error.contains("id 11") && error.contains("11 rows"), "{error}");
        let error = forward(&id_tensor(&[1, 2, 3]), &three, &tables).unwrap_err().to_string();
        assert!(error.contains("3 tokens") && error.contains("4 rows"), "{error}");
        assert!(forward(&id_tensor(&[1]), &two, &tables).is_err());
        assert!(
            forward(
                &id_tensor(&[1, 2]),
                &two,
                &Tables { token_type_embeddings: Some(&random(1, (0, 3))), ..tables }
            )
            .is_err()
        );
        assert!(forward(&random(1, 2), &two, &tables).is_err());

        let (dx, ids) = (random(1, (2, 3)), id_tensor(&[1, 11]));
        assert!(backward(&dx, &ids, &two, 0, Some(&word), None, None).is_err());
        assert!(backward(&dx, &ids, &two, 3, None, Some(&position), None).is_err());
        assert!(backward(&dx, &ids, &two, 0, None, None, Some(&random(1, (1, 4)))).is_err());
        assert!(backward(&dx, &ids, &three, 0, None, None, None).is_err());
        assert!(backward(&dx, &ids, &two, 0, None, None, None).is_ok());
    }
}
