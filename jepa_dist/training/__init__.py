"""The training core, divided by lifetime; ``assemble.build_trainer`` assembles a run.

=============  ==================================================================================
module         holds
=============  ==================================================================================
state          what lives as long as the process: model, objective, schedule, optimizer, EMA
segment        what a resume or a roll-back replaces: progress, batches, plans, reduction, digests
step           one optimizer step: accumulate, clip, update
global_loss    one micro-batch's share of the global loss, as sums over rows
instruments    measurements of a step, all behind one interface
stopping       requests to stop, from any rank
evaluation     validation, the averaged weights', a text sample
saving         checkpoints
recovery       the roll-back after bad steps, and the refusal to finish with them
health         steps whose loss or gradient is not finite, counted
warm_up        compiling every graph before the first step
times          where time goes: phases, training time, start-up
records        fields of a logged step's record
baselines      the n-gram baselines that a run is compared with
listeners      receivers of a run's reports
loop           ``Trainer`` and ``Outcome``: what a run does in which order
assemble       builds all of it from a configuration
=============  ==================================================================================
"""
