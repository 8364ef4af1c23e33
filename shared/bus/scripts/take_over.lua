-- Prelude: claim entries of a consumer inside Redis, so that of two replicas that look at once only one gets each: the
-- second finds them in the first one's list.
-- KEYS: stream
-- ARGV: consumer group, consumer, ...
local function take_over(pending, taken)
  for _, entry in ipairs(pending) do
    local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry[1])[1]
    if claimed then
      taken[#taken + 1] = {entry[1], entry[4] + 1, claimed[2]}
    end
  end
end
