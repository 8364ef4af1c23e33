// Questions and types that both packages' tests share.
import { z } from "zod";

export const BASE_URL = `${process.env.BASE_URL}/v1`;
export const API_KEY = "none";
export const MODEL = "demo";
export const WEATHER_QUESTION = "What is the weather in Paris?";
export const FACT_QUESTION = "What is a mill race?";
export const FACT = "A mill race is the channel that leads water to the wheel of a mill.";
export const City = z.object({ city: z.string().max(12) });
// Each field is bounded, so that any model comes to its end.
export const Report = z.object({
  city: z.string().max(12),
  degrees: z.int().min(-50).max(50),
  sky: z.enum(["sunny", "cloudy", "rainy"]),
});
