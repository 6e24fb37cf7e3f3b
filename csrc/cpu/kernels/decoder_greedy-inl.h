// Greedy decoding of a skinny batch: steps of the decoder, each followed by the choice of the next tokens.
//
// A team of threads divides every product and the rows of the choice; a barrier follows each.
#pragma once

#include <cstdint>

#include "cpu/isa/region.h"
#include "cpu/kernels/candidates-inl.h"
#include "cpu/kernels/decoder_forward-inl.h"
#include "cpu/kernels/decoder_params.h"
#include "cpu/runtime/team.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Chooses the tokens of step t for this member's rows, and marks the rows that end with them.
template <class S>
void decoder_choose(const DecoderGreedyParams<S>& g, const DecoderBlock<S>& block, int64_t t) {
  const int64_t N = g.step.rows;
  CandidatesParams<S> c{};
  c.beams = 1, c.vocab = g.step.output.M, c.count = 1;
  c.logits = g.step.logits;
  c.forbidden = g.forbidden;
  c.forbidden_count = t < g.early_steps ? g.forbidden_early : g.forbidden_later;
  c.last_resort = g.end_token;
  c.totals = g.log_probs + t * N, c.parents = g.parents, c.tokens = g.tokens + t * N;
  candidates(c, block.first(N), block.last(N));
  for (int64_t n = block.first(N); n < block.last(N); ++n) {
    if (c.tokens[n] == g.end_token || t + 1 >= g.limits[n]) g.done[n] = 1;
  }
}

template <class S>
bool enough_rows_done(const DecoderGreedyParams<S>& g) {
  int64_t count = 0;
  for (int64_t n = 0; n < g.step.rows; ++n) count += g.done[n] != 0;
  return count >= g.enough_done;
}

template <class S>
void decoder_greedy(const DecoderGreedyParams<S>& g,
                    ThreadTeam& team,
                    int64_t members,
                    ThreadTeam::Share share,
                    void* scratch) {  // attention_scratch_bytes
  const FlushDenormals flush;
  DecoderForwardParams<S> p = g.step;  // this member's view of the step
  const int64_t K = p.attention.steps;
  DecoderForward<S> job{p, {0, p.rows / K, K, team, share, members}, scratch};
  for (int64_t t = 0; t < g.most_steps; ++t) {
    const int64_t side = t % 2;
    p.h = g.h[side], p.c = g.c[side], p.vectors = g.vectors[side];
    job.block.reversed = (t + p.first_order) % 2 == 1;
    if (!decoder_step(job, 0)) return;
    decoder_logits(job, 0);
    if (!job.block.wait()) return;
    decoder_choose(g, job.block, t);
    if (!job.block.wait()) return;
    if (job.block.share.begin == 0) *g.steps_run = t + 1;
    if (enough_rows_done(g)) return;  // every member reads the same flags: the next are written two barriers later
    p.tokens = g.tokens + t * p.rows;
    p.h0 = p.h, p.c0 = p.c;
    if (p.feed) p.feed = p.vectors;
  }
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
