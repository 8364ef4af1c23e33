-- Prelude: `claim_entries` claims pending entries of a consumer inside Redis, so that two replicas that claim at once
-- never get the same entry: the second finds it in the first one's list.
-- `taken` receives {entry id, attempts, fields} of each.
-- KEYS: stream
-- ARGV: consumer group, consumer, ...
local function claim_entries(pending, taken)
  for _, entry in ipairs(pending) do
    local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry[1])[1]
    if claimed then
      taken[#taken + 1] = {entry[1], entry[4] + 1, claimed[2]}
    end
  end
end
